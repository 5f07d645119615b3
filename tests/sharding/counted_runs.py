"""Runs whose collectives and bytes are counted, inside the worker processes of `ranks.py`."""

import time
from typing import Any

import pytest
import torch.distributed as dist
from collectives import GLOO, CollectiveLog, socket_bytes
from run_training import prepared_run

from dlora.sharding.engines.storage import held_bytes


def counted(argv: list[str]) -> dict[str, Any]:
    """A run's collectives, its bytes on sockets, and what the plan says of one step."""
    run = prepared_run(argv)
    dist.barrier()
    before = socket_bytes()
    with CollectiveLog() as log:
        run.train()
    dist.barrier()
    time.sleep(0.05)  # until the last acknowledgements are in
    budget = run.prepared.budget
    return {
        "calls": log.calls,
        "sockets": (socket_bytes() - before).total(),
        "gathers": budget.gathers,
        "reduction": budget.reduction,
        "holds": (held_bytes(run.model), budget.base_held),
    }


def last_step(argv: list[str]) -> dict[str, Any]:
    """The collectives between a run's last but one optimizer step and its last."""
    run, marks = prepared_run(argv), []
    with CollectiveLog() as log:
        run.optimizer.register_step_post_hook(lambda *_: marks.append(len(log.calls)))
        run.train()
    budget = run.prepared.budget
    return {
        "calls": log.calls[marks[-2] : marks[-1]],
        "planned": budget.gathers + budget.reduction,
        "holds": (held_bytes(run.model), budget.base_held),
    }


def sent(result: dict[str, Any]) -> float:
    """Bytes of its collectives, in the ring's measure."""
    return sum(call.sent() for call in result["calls"])


def check_sent(result: dict[str, Any], planned: float, rounding: float = 0) -> None:
    """Collectives, bytes on sockets and what stays between steps are what the plan says."""
    assert sent(result) == pytest.approx(planned, abs=rounding)
    on_sockets = sum(call.sent(GLOO) for call in result["calls"])
    headers = 2048 * len(result["calls"])
    assert on_sockets <= result["sockets"] <= on_sockets + headers
    assert result["holds"][0] == result["holds"][1]


def check_last_step(result: dict[str, Any], rounding: float = 0) -> None:
    """Under ZeRO-3, whose gathered vectors may keep the padding of their last part."""
    assert sent(result) == pytest.approx(result["planned"], abs=rounding)
    assert result["holds"][0] == pytest.approx(result["holds"][1], rel=2e-3)
