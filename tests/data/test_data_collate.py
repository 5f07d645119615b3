"""Batches: shapes, padding, shifted targets; and that nothing else in dlora.data needs torch."""

import ast
from pathlib import Path

import numpy as np
import pytest
import torch
from causal_models import causal_model

import dlora.data
from dlora.data import NO_TARGET, Example
from dlora.data.collate import collate, packed


def example(number: int, ids: list[int], targets: list[int]) -> Example:
    """An example whose targets are the tokens at the given positions."""
    labels = [token if i in targets else NO_TARGET for i, token in enumerate(ids)]
    arrays = np.array(ids, np.int32), np.array(labels, np.int32)
    for array in arrays:
        array.setflags(write=False)  # as a Dataset's are
    return Example(number, *arrays)


@pytest.mark.filterwarnings("error")
def test_padding_and_shift():
    batch = collate([example(7, [5, 6, 7, 8], [2, 3]), example(3, [9, 10], [1])], pad_id=0)
    pad, no_target = [0] * 4, [NO_TARGET] * 5
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, *pad], [9, 10, 0, 0, *pad]]
    assert batch.targets.tolist() == [[-100, 7, 8, *no_target], [10, -100, -100, *no_target]]
    assert (batch.ids, batch.lengths, batch.num_targets) == ([7, 3], [4, 2], 3)
    assert {tensor.dtype for tensor in (batch.input_ids, batch.targets)} == {torch.int64}


@pytest.mark.filterwarnings("error")
def test_packed_into_one_row():
    """Positions start again, and no label is shifted across the end of a sequence."""
    sequences = [example(7, [5, 6, 7, 8], [2, 3]), example(3, [9, 10, 11, 12, 13], [0, 4])]
    batch = packed(sequences, pad_id=0)
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9, 10, 11, 12, 13, *[0] * 7]]
    assert batch.inputs["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1, 2, 3, 4, *range(7)]]
    assert batch.targets.tolist() == [[-100, 7, 8, *[-100] * 4, 13, *[-100] * 8]]
    assert batch.positions.tolist() == [[0, 1], [0, 2], [0, 7]]
    assert (batch.ids, batch.lengths, batch.num_targets) == ([7, 3], [4, 5], 3)
    assert batch.packed and batch.places == 16


@pytest.mark.parametrize("few", [0, 1])
def test_one_sequence_has_the_row_that_it_has_anyway(few: int):
    sequences = [example(7, [5, 6, 7, 8], [2, 3])][:few]
    batch, plain = packed(sequences, pad_id=0), collate(sequences, pad_id=0)
    assert not batch.packed and batch.inputs.keys() == {"input_ids"} and batch.places == 8
    assert torch.equal(batch.input_ids, plain.input_ids) and batch.lengths == plain.lengths


@pytest.mark.parametrize(("longest", "padded"), [(2, 8), (7, 8), (8, 8), (9, 16), (16, 16)])
def test_padded_to_few_distinct_lengths(longest: int, padded: int):
    batch = collate([example(0, list(range(1, longest + 1)), [1])], pad_id=0)
    assert batch.input_ids.shape == batch.targets.shape == (1, padded)


def test_right_padding_without_a_mask_changes_nothing():
    """The model's own masked forward over padded rows is the reference."""
    model = causal_model("llama", torch.float64).eval()
    examples = [example(0, [5, 6, 7, 8, 9], [2]), example(1, [9, 10], [1])]
    batch = collate(examples, pad_id=0)
    mask = torch.zeros_like(batch.input_ids)
    for row, length in enumerate(batch.lengths):
        mask[row, :length] = 1
    with torch.no_grad():
        ours = model(input_ids=batch.input_ids).logits
        theirs = model(input_ids=batch.input_ids, attention_mask=mask).logits
    real = mask.bool()
    torch.testing.assert_close(ours[real], theirs[real], rtol=1e-12, atol=1e-12)


def test_targets_agree_with_the_shift_inside_transformers():
    """Cross entropy of targets at t equals that of transformers' labels at t + 1."""
    torch.manual_seed(0)
    one = example(0, [5, 6, 7, 8, 9], [1, 3, 4])
    batch = collate([one], pad_id=0)
    logits = torch.randn(1, 8, 12)
    labels = torch.tensor(one.labels[None], dtype=torch.int64)
    theirs = torch.nn.functional.cross_entropy(
        logits[:, :4].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum"
    )
    ours = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), batch.targets.flatten(), reduction="sum"
    )
    torch.testing.assert_close(ours, theirs)
    assert batch.num_targets == one.num_targets == 3


def test_no_examples_give_a_batch_of_weight_zero():
    batch = collate([], pad_id=3)
    assert batch.input_ids.tolist() == [[3] * 8]
    assert batch.targets.tolist() == [[-100] * 8]
    assert (batch.ids, batch.lengths, batch.num_targets) == ([], [], 0)


def test_device():
    batch = collate([example(0, [1, 2], [1]), example(1, [3], [])], pad_id=0, device="meta")
    assert all(t.is_meta for t in (batch.input_ids, batch.targets))
    assert batch.num_targets == 1


def test_only_collate_imports_torch_and_nothing_imports_the_rest_of_dlora():
    for path in Path(dlora.data.__file__).parent.glob("[!_]*.py"):
        names: set[str] = set()
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Import):
                names.update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                names.add(node.module or "")
        foreign = {name for name in names if name.split(".")[0] in ("torch", "transformers")}
        assert not foreign or path.name == "collate.py", (path, foreign)
        ours = {name for name in names if name.split(".")[0] == "dlora"}
        allowed = ("dlora.data", "dlora.errors", "dlora.io.files", "dlora.registry")
        assert all(name.startswith(allowed) for name in ours), (path, ours)
