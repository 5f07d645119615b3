"""What a plan starts from: the memory of the machine, and what an earlier start had chosen."""

import os
from typing import Any

import pytest
import torch

from dlora.config.load import parse
from dlora.plan.capacity import free_bytes
from dlora.plan.choose import capacity_of
from dlora.training.earlier_placement import Earlier, earlier_placement, settle

CPU = torch.device("cpu")


def test_the_ranks_of_a_machine_share_its_memory() -> None:
    installed = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    alone, half = free_bytes(CPU, 1), free_bytes(CPU, 2)
    assert alone is not None and half is not None
    assert 0 < alone <= installed
    assert half == pytest.approx(alone / 2, rel=0.2)  # others work on this machine as well


def test_a_budget_stands_above_what_is_free() -> None:
    budget, free, unknown = (
        capacity_of(2.5, 10**9),
        capacity_of(None, 10**9),
        capacity_of(None, None),
    )
    assert budget is not None and (budget.nbytes, budget.is_budget) == (2_500_000_000, True)
    assert free is not None and free.nbytes < 10**9 and not free.is_budget
    assert unknown is None


# words of the command line, ranks, what is settled: engine, base, optimizer state
KEPT: dict[str, Any] = {
    "all of it": ([], 4, ("zero3", "node", "divided")),
    "but for an engine of the user's": (["engine=fsdp2"], 4, ("fsdp2", "node", "divided")),
    "but for a state of the user's": (
        ["optimizer_state=replicated"],
        4,
        ("zero3", "node", "replicated"),
    ),
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
