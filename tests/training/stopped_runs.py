"""Runs that end in the middle, and what is left of them; inside the workers of `ranks.py`."""

import contextlib
import itertools
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist
from run_training import Run, Runs, same_bits, train


class Crash(Exception):  # noqa: N818
    """What ends a run in the middle."""


def after_step(number: int, act: Callable[[], None]) -> Callable[[Any], None]:
    """Meddles with a run: `act` as soon as its optimizer has made its `number`th step."""

    def meddle(run: Any) -> None:
        made = itertools.count(1)
        run.optimizer.register_step_post_hook(lambda *_: act() if next(made) == number else None)

    return meddle


def crash() -> None:
    raise Crash


def crashed(argv: list[str], steps: int) -> str:
    """A run that dies in its `steps`th step, past its last checkpoint."""
    try:
        train(argv, after_step(steps, crash))
    except Crash:
        return "crashed"
    return "finished"


@contextlib.contextmanager
def handlers_kept() -> Iterator[None]:
    """Afterwards the signal handlers are those that there were."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def terminated(argv: list[str]) -> dict[str, Any]:
    """A run of which the last rank alone gets SIGTERM, in its 4th step."""
    last = dist.get_rank() == dist.get_world_size() - 1
    with handlers_kept():
        kill = after_step(4, lambda: os.kill(os.getpid(), signal.SIGTERM))
        return train(argv, kill if last else None)


def steps_saved(directory: Path) -> list[str]:
    return sorted(path.name for path in (directory / "checkpoints").glob("step-*"))


def check_equal(run: Run, whole: Run) -> None:
    """Bit for bit, on every rank, and every step stands in the metrics once."""
    (results, metrics), ((wanted, *others), wanted_metrics) = run, whole
    assert metrics == wanted_metrics
    everywhere = all(other["optimizer"] is not None for other in others)
    for result in results:
        assert result["status"] == 0
        assert same_bits(result["tensors"], wanted["tensors"])
        if result is results[0] or everywhere:  # a divided one is rank 0's alone
            assert same_bits(result["optimizer"], wanted["optimizer"])


def interrupted_run(run: Runs, steps: int, *words: Any) -> Path:
    """The directory of a run on 2 ranks that crashed in a step, past its checkpoint of the 3rd."""
    results, _ = run("run", 2, *words, work=crashed, arguments=(steps,))
    assert results == ["crashed"] * 2
    assert steps_saved(run.root / "run") == ["step-000003"]
    return run.root / "run"
