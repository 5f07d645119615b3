"""`train.tokens_per_micro_batch`: the same steps, whatever a micro-batch is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import refusals
import yaml
from run_training import Runs, check_near, prepared_run, same_bits, told
from sampling import sampled
from tiny import command

from dlora.errors import UsageError

BY_TOKENS = {"train__micro_batch_size": None, "train__tokens_per_micro_batch": 96}
PLACES = ((1, "fsdp2"), (2, "fsdp2"), (3, "zero3"))


@pytest.mark.parametrize(
    ("packing", "world", "engine"),
    sampled(
        [(True, 2, "fsdp2"), (False, 3, "zero3")],
        [(packing, *place) for packing in (True, False) for place in PLACES],
    ),
)
def test_twenty_steps_end_where_they_end_by_number(
    run: Runs, packing: bool, world: int, engine: str
) -> None:
    """Seven sequences over three ranks: some have an empty micro-batch."""
    where = {"sharding__engine": engine, "sharding__base": "world"}
    drops = {"adapter__lora_dropout": 0.1}
    by_number = run("number", 1, **drops, data__packing=False)
    settings = drops | where | BY_TOKENS | {"data__packing": packing}
    check_near(run("tokens", world, **settings), by_number)


def shapes(argv: list[str]) -> list[list[int]]:
    """Places of the micro-batches of each step of this rank, none of which is trained on."""
    run = prepared_run(argv)
    found = []
    with run.batches() as batches:
        for step in range(run.total_steps):
            _, mine = batches.step(step)
            found.append([batch.places for batch in mine])
    return found


@pytest.mark.parametrize("packing", [True, False])
def test_ranks_have_equal_work_within_the_limit(run: Runs, packing: bool) -> None:
    settings = BY_TOKENS | {"train__max_steps": 3, "train__global_batch_size": 16}
    results = run.pools(2).run(
        shapes, run.command(run.root / "run", **settings, data__packing=packing)
    )
    one, other = results
    assert [len(step) for step in one] == [len(step) for step in other]
    assert max(map(max, one)) <= 96 and max(map(max, other)) <= 96
    if packing:
        sums = np.array([[sum(step) for step in rank] for rank in results])
        assert (abs(sums[0] - sums[1]) <= 0.1 * sums.max(0)).all()


# -- what fits ------------------------------------------------------------------------------------


def test_auto_is_said_stored_and_resumed(run: Runs, tmp_path: Path) -> None:
    auto = {"train__micro_batch_size": None, "train__tokens_per_micro_batch": "auto"}
    settings = auto | {"output__save_every": 2, "train__global_batch_size": 8}
    [(whole, printed)], _ = run("whole", 1, work=told, **settings, train__max_steps=4)
    stored = yaml.safe_load((tmp_path / "whole/config.yaml").read_text())["train"]
    tokens = stored["tokens_per_micro_batch"]
    assert f"train.tokens_per_micro_batch: {tokens}\n" in printed
    assert "micro_batch_size" not in stored
    # Memory is plenty for so small a model: the sequences of a step are one micro-batch.
    [found] = run.pools(1).run(shapes, run.command(tmp_path / "shapes", **settings))
    assert {len(step) for step in found} == {1}
    run("run", 1, **settings, train__max_steps=2, optimizer__schedule="constant")
    [resumed], _ = run("run", 1, **settings, train__max_steps=4, optimizer__schedule="constant")
    [again], _ = run("again", 1, **settings, train__max_steps=4, optimizer__schedule="constant")
    assert same_bits(resumed["tensors"], again["tensors"])
    assert whole["status"] == 0


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.usefixtures("no_weights_are_read")
def test_auto_stays_within_the_budget(saved_models: Any, tmp_path: Path, packing: bool) -> None:
    """Of lengths that are as unequal as can be: one sequence has most tokens."""
    texts = tmp_path / "texts.jsonl"
    words = ["a" * 900, *("b" * n for n in range(1, 120))]
    texts.write_text("".join(f'{{"text": "{w}"}}\n' for w in words))
    data = {"data__train": str(texts), "data__format": "text", "data__packing": packing}
    data |= {"train__global_batch_size": 120, "train__tokens_per_micro_batch": "auto"}
    found = {}
    for budget in (0.08, 0.3):
        limit = {"sharding__memory_budget_gb": budget}
        argv = command(saved_models("llama"), tmp_path, **data, **limit)
        prepared = refusals.preparation(argv, check=True)
        plan, found[budget] = prepared.budget, prepared.dealing.tokens
        assert plan.memory.peak <= budget * 1e9
        dealt = prepared.dealing(prepared.sampler.step(0), prepared.train.lengths, 1)
        for micro in dealt[0]:
            lengths = [int(prepared.train.lengths[i]) for i in micro]
            assert prepared.dealing.places(lengths) <= plan.workload.rows * plan.workload.tokens
    assert 904 <= found[0.08] < found[0.3]
    argv = command(saved_models("llama"), tmp_path, **data, sharding__memory_budget_gb=0.03)
    with pytest.raises(UsageError, match="^sharding.memory_budget_gb: .* is not enough"):
        refusals.preparation(argv, check=True)


# -- what is refused ------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_weights_are_read")
@pytest.mark.parametrize("streaming", [False, True])
def test_a_sequence_that_does_not_fit_is_refused(
    saved_models: Any, tmp_path: Path, streaming: bool
) -> None:
    argv = command(saved_models("llama"), tmp_path, train__tokens_per_micro_batch=16)
    argv += ["--data.streaming", "true"] if streaming else []
    message = "^train.tokens_per_micro_batch: 16 is less than the [0-9]+ tokens of the longest seq"
    with pytest.raises(UsageError, match=message):
        refusals.preparation(argv, check=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train__micro_batch_size": 2}, "train.micro_batch_size is set as well"),
        ({"train__task": "seq2seq"}, "seq2seq pads sources and answers apart"),
        ({"train__tokens_per_micro_batch": 0}, "train.tokens_per_micro_batch: "),
    ],
)
def test_what_contradicts_it_is_refused(
    saved_models: Any, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    given = {"train__tokens_per_micro_batch": 64} | settings
    with pytest.raises(UsageError, match=message):
        refusals.preparation(command(saved_models("llama"), tmp_path, **given), check=True)
