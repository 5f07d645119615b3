"""Rows of one batch with different adapters: `adapter_names`, beside PEFT's and row by row."""

from pathlib import Path
from typing import Any

import pytest
import torch
from causal_models import causal_model, quiet_peft, token_ids
from peft import PeftModel
from refusals import refusal
from test_named import A, B, moved
from torch import Tensor

from dlora import LoraConfig, activate, attach, disabled, save_adapter

pytestmark = quiet_peft
CASES: dict[str, tuple[str, LoraConfig, LoraConfig]] = {
    "linear": ("llama", A, B),
    "conv1d": (
        "gpt2",
        LoraConfig(r=4, target_modules=["c_attn"]),
        LoraConfig(r=2, target_modules=["c_attn", "c_fc"]),
    ),
    "embedding": (
        "llama",
        LoraConfig(r=4, target_modules=["embed_tokens", "q_proj"]),
        LoraConfig(r=2, target_modules=["embed_tokens"]),
    ),
}
ROWS = ["b", "__base__", "a", "b", "a"]


def rows_of(model: Any, names: list[str], ids: Tensor, **options: Any) -> Tensor:
    with torch.no_grad():
        return model(ids, adapter_names=names, **options).logits


@pytest.mark.parametrize("case", CASES)
def test_rows_are_pefts(case: str, tmp_path: Path) -> None:
    kind, a, b = CASES[case]
    model = moved(moved(causal_model(kind), a, "a", 1), b, "b", 2).eval()
    for name in "ab":
        save_adapter(model, tmp_path / name, name=name)
    theirs = PeftModel.from_pretrained(causal_model(kind), tmp_path / "a", adapter_name="a")
    theirs.load_adapter(tmp_path / "b", adapter_name="b")
    ids = token_ids(rows=len(ROWS))
    expected = rows_of(theirs.eval(), ROWS, ids)
    torch.testing.assert_close(rows_of(model, ROWS, ids), expected, atol=1e-5, rtol=1e-5)
    activate(model, [])  # what is active has no part in it
    torch.testing.assert_close(rows_of(model, ROWS, ids), expected, atol=1e-5, rtol=1e-5)
    with torch.no_grad(), disabled(model):
        off = rows_of(model, ROWS, ids)
        assert torch.equal(off, model(ids).logits)


def test_rows_are_what_each_adapter_gives_alone() -> None:
    """Of a DoRA too, which PEFT refuses, and of the adapter without a name."""
    dora = LoraConfig(r=2, use_dora=True, target_modules=["q_proj", "up_proj"])
    model = moved(moved(causal_model("llama"), dora, "dora", 1), A, "default", 2).eval()
    names, ids = ["default", "dora", "__base__", "dora"], token_ids(rows=4)
    found = rows_of(model, names, ids)
    for row, name in enumerate(names):
        activate(model, [] if name == "__base__" else name)
        with torch.no_grad():
            expected = model(ids[row : row + 1]).logits
        torch.testing.assert_close(found[row : row + 1], expected, atol=1e-5, rtol=1e-5)


def test_the_only_adapter_has_rows() -> None:
    model = moved(causal_model("llama"), A, "default", 1).eval()
    ids = token_ids()
    with torch.no_grad():
        on = model(ids).logits
        with disabled(model):
            off = model(ids).logits
    found = rows_of(model, ["default", "__base__"], ids)
    torch.testing.assert_close(found, torch.stack([on[0], off[1]]))
    assert torch.equal(rows_of(model, ["default"] * 2, ids), on)


@pytest.mark.parametrize("how", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_rows_of_a_generation(how: dict[str, Any]) -> None:
    model = moved(moved(causal_model("llama"), A, "a", 1), B, "b", 2).eval()
    ids = token_ids(rows=3)
    names = ["b", "__base__", "a"]
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, **how}
    found = model.generate(ids, adapter_names=names, **options)
    for row, name in enumerate(names):
        activate(model, [] if name == "__base__" else name)
        expected = model.generate(ids[row : row + 1], **options)
        assert torch.equal(found[row : row + 1], expected)


def test_what_rows_cannot_be_is_refused() -> None:
    model = moved(moved(causal_model("llama"), A, "a", 1), B, "b", 2)
    ids = token_ids()
    training = "adapter_names: the model is in training mode; call model.eval() first"
    assert refusal(rows_of, model.train(), ["a", "b"], ids) == training
    model.eval()
    unknown = "adapter_names: the model has no adapters named 'c'; there are 'a', 'b'"
    assert refusal(rows_of, model, ["a", "c"], ids) == unknown
    count = "gets an input of 2 rows for 3 names"
    assert count in refusal(rows_of, model, ["a", "b", "a"], ids)
    assert refusal(rows_of, model, "ab", ids).startswith("adapter_names: expected a list of names")
    with torch.no_grad():
        assert torch.equal(model(ids).logits, rows_of(model, ["a", "a"], ids))
    attach(model, LoraConfig(target_modules=[], modules_to_save=["lm_head"]), "c")
    assert "is one of modules_to_save" in refusal(rows_of, model, ["a", "c"], ids)
    assert rows_of(model, ["a", "b"], ids).shape[0] == 2
