"""dlora's own run of a base, and the figures that the table compares: loss and gradient."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import ranks
import torch

from dlora.config.load import parse
from dlora.errors import UsageError
from dlora.plan import plan
from dlora.plan.activations import Trace, estimate
from dlora.runtime.memory import MemoryMeter
from dlora.runtime.ranks import Ranks
from dlora.runtime.run_lock import RunLock
from dlora.train import Run
from dlora.training.evaluate import held_out
from dlora.training.startup import prepared

from .architectures import CHATS

SETTINGS: dict[str, Any] = {
    "model.dtype": "float32",
    "adapter.r": 4,
    "adapter.lora_alpha": 8,
    "train.max_steps": 1,
    "train.global_batch_size": CHATS,
    "train.micro_batch_size": CHATS,
    "output.tensorboard": False,
    "output.save_every": 0,
    "output.samples": 0,
}


class Refused(Exception):  # noqa: N818
    """The command refuses this, before a weight is read; says why."""


@dataclass(frozen=True)
class Figures:
    """What one step of a run computes, over all ranks.

    Attributes:
        base: held-out loss with the adapters as they start, so of the base.
        loss, norm: in evaluation mode, with random adapters.
        trained_loss, trained_norm: in training mode, with the same.
    """

    base: float
    loss: float
    norm: float
    trained_loss: float
    trained_norm: float


def started(directory: Path, *, traced: bool = False, **settings: Any) -> Run:
    """A run on the base in `directory`, as `dlora.train` sets it up; `__` in a key is a dot.

    Args:
        traced: the plan traces the model, which takes as long as all the rest, and is the same for
            every run of a base; else it estimates.

    Raises:
        Refused: before a weight is read.
    """
    data = str(directory / "chats.jsonl")
    given = SETTINGS | {"model.path": str(directory), "data.train": data, "data.eval": data}
    given |= {"output.dir": str(directory / "run")}
    given |= {key.replace("__", "."): value for key, value in settings.items()}
    words = []
    for key, value in given.items():
        words += [f"--{key}", value if isinstance(value, str) else json.dumps(value)]
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    these = Ranks(rank, world, torch.device("cpu"), ranks.current_store if world > 1 else None)
    lock = RunLock(directory / "run", "not taken")
    with silence():
        try:
            config = parse(words, prog="dlora.train").config
            with nullcontext() if traced else mock.patch.object(plan, "trace", _estimated):
                preparation = prepared(config, these, check=True)
        except UsageError as error:
            raise Refused(str(error)) from error
        run = Run(config, these, preparation, _meter(), lock)
    run.stop.close()  # its sockets and thread would outlive it
    return run


def _estimated(skeleton: Any, rows: int, tokens: int, **how: Any) -> Trace:
    how["reason"] = "not traced"
    how.pop("lengths", None)  # only of a trace
    return estimate(skeleton, rows * tokens, **how)


@functools.cache
def _meter() -> MemoryMeter:
    """One for all runs of this process: it collects garbage, and of so many models that is long."""
    return MemoryMeter()


def figures(run: Run) -> Figures:
    """The figures of a run, whose adapters are random afterwards."""
    base = held_out(run.context)["eval_loss"]
    randomize(run)
    run.model.eval()
    loss, norm = _step(run)
    run.model.train()
    return Figures(base, loss, norm, *_step(run))


@torch.no_grad()
def randomize(run: Run) -> None:
    """Move A and B away from their start, equally on all ranks, so that ΔW is not 0."""
    generator = torch.Generator().manual_seed(2)
    for parameter in run.replica.named.values():
        parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)


def _step(run: Run) -> tuple[float, float]:
    """Loss and gradient norm of the first step, which is not taken."""
    run.replica.zero_grad()
    with run.batches() as batches:
        _, mine = batches.step(0)
        losses, tokens = run.passes(0, mine)
        reduced = run.replica.reduce_gradients(tokens, scalars=losses)
    return reduced.scalars["loss"] / reduced.tokens, float(reduced.norm)


def two_ranks(directory: Path, engine: str) -> Figures | tuple[str, str]:
    """The figures on the ranks of this world with W0 divided by `engine`, or mark and reason."""
    try:
        run = started(directory, sharding__engine=engine, sharding__base="world")
    except Refused as error:
        return "refused", str(error)
    return figures(run)


@contextlib.contextmanager
def silence() -> Iterator[io.StringIO]:
    """Inside, standard output goes to the buffer."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        yield printed
