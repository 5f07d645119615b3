"""What a plan starts from: the memory of the machine, and what an earlier start had chosen."""

import os
from typing import Any

import numpy as np
import pytest
import torch

from dlora.config.load import parse
from dlora.data import Dataset, Dealing, Sampler, deal
from dlora.data.collate import collate, packed
from dlora.data.encode import NO_TARGET
from dlora.data.report import Report
from dlora.plan.capacity import free_bytes
from dlora.plan.choose import capacity_of
from dlora.plan.workload import workload_of
from dlora.training.earlier_placement import Earlier, earlier_placement, settle

CPU = torch.device("cpu")


def test_the_ranks_of_a_machine_share_its_memory() -> None:
    installed = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    alone, half = free_bytes(CPU, 1), free_bytes(CPU, 2)
    assert alone is not None and half is not None
    assert 0 < alone <= installed
    assert half == pytest.approx(alone / 2, rel=0.2)  # others work on this machine as well


def test_a_budget_stands_above_what_is_free() -> None:
    budget, free = capacity_of(2.5, 10**9), capacity_of(None, 10**9)
    unknown = capacity_of(None, None)
    assert budget is not None and (budget.nbytes, budget.is_budget) == (2_500_000_000, True)
    assert free is not None and free.nbytes < 10**9 and not free.is_budget
    assert unknown is None


@pytest.mark.parametrize("packs", [False, True])
@pytest.mark.parametrize(("world", "size"), [(1, 4), (2, 2), (3, 4)])
def test_the_largest_micro_batch_is_that_of_the_run(world: int, size: int, packs: bool) -> None:
    """Of its sequences in its order, and not the longest of all the data."""
    generator = np.random.default_rng(0)
    lengths = [*generator.integers(9, 90, 60), 200]
    starts = np.cumsum([0, *lengths])
    ids = np.zeros(starts[-1], dtype=np.int32)
    labels = np.where(generator.random(len(ids)) < 0.3, 1, NO_TARGET).astype(np.int32)
    labels[starts[:-1]] = NO_TARGET  # the first token has none that could predict it
    data = Dataset(ids, labels, starts, Report(61, 61, 0, 0, 0, max(lengths), 256))
    sampler = Sampler(60, 12, seed=3, shuffle=True, max_steps=4)
    words = ["--model.path=m", "--data.train=d.jsonl", "--output.dir=o"]
    words += ["--train.global_batch_size=12", f"--train.micro_batch_size={size}"]
    config, dealing = parse(words, prog="dlora.train").config, Dealing(size, packs=packs)
    workload = workload_of(config, world, data, sampler, dealing=dealing)
    batches = [
        (packed if packs else collate)([data[i] for i in micro], pad_id=0)
        for step in range(4)
        for micros in deal(sampler.step(step), data.lengths, world, size)
        for micro in micros
    ]
    assert workload.rows * workload.tokens == max(batch.targets.numel() for batch in batches)
    assert workload.targets == max(batch.num_targets for batch in batches)
    assert workload.tokens < 200 or packs


# words of the command line, ranks, what is settled: engine, base, optimizer state
KEPT: dict[str, Any] = {
    "all of it": ([], 4, ("zero3", "node", "divided")),
    "but for an engine of the user's": (["engine=fsdp2"], 4, ("fsdp2", "node", "divided")),
    "but for its state": (["optimizer_state=replicated"], 4, ("zero3", "node", "replicated")),
    "nothing beside a base of the user's": (["base=world"], 4, ("fsdp2", "world", "auto")),
    "nothing on other ranks": ([], 2, ("fsdp2", "auto", "auto")),
}


@pytest.mark.parametrize("case", KEPT)
def test_a_resume_keeps(case: str) -> None:
    chosen, ranks, settled = KEPT[case]
    words = ["--model.path=m", "--data.train=d.jsonl", "--output.dir=o"]
    config = parse([*words, *(f"--sharding.{word}" for word in chosen)], prog="dlora.train").config
    settings = settle(config, Earlier("zero3", "node", "divided", ranks=4), ranks)
    assert (settings.engine, settings.base, settings.optimizer_state) == settled
    if ranks == 2:
        assert "2 rank(s)" in settings.reason and "4" in settings.reason


def test_a_checkpoint_says_what_it_was_written_under() -> None:
    settings = {"sharding": {"engine": "zero3", "base": "node", "optimizer_state": "divided"}}
    assert earlier_placement(settings, {"ranks": 4}) == Earlier("zero3", "node", "divided", 4)
    old = {"sharding": {"engine": "fsdp2", "base": "world"}}
    assert earlier_placement(old, {}) == Earlier("fsdp2", "world", "auto", None)
    assert earlier_placement({}, {}) is None
