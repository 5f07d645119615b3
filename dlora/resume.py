"""Where a run starts from: the directory of an earlier one, checked, or an empty one."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from dlora import checkpoint as checkpoints
from dlora.checkpoint import Checkpoint
from dlora.config import Config, dump_yaml
from dlora.files import unused_name, write_atomically
from dlora.metrics import MetricsLog
from dlora.prepare import Preparation
from dlora.runtime import Runtime
from dlora.start import output_directory


def resume(
    runtime: Runtime,
    preparation: Preparation,
    named: Mapping[str, nn.Parameter],
    optimizer: Optimizer,
) -> int:
    """Restore the checkpoint that `prepare` chose; returns the step to go on from (0: fresh).

    Rank 0 reads; the tensors are broadcast, so that no other rank needs to see its disk.

    Raises:
        UsageError: on every rank, if the checkpoint is damaged by now.
    """

    def find() -> tuple[Checkpoint | None, str]:
        start = preparation.start
        return (checkpoints.read(Path(start.directory)) if start and runtime.main else None), ""

    checkpoint = _shared(runtime, runtime.agree("resume", find))
    if checkpoint is None:
        return 0
    checkpoints.restore(checkpoint, named, optimizer)
    step = int(checkpoint.state["step"])
    runtime.say(f"resuming after step {step}")
    return step


def open_directory(config: Config, preparation: Preparation, start: int) -> MetricsLog:
    """Write `config.yaml` and open the metrics; rank 0 only.

    What another run left in the directory is set aside, all of it before a fresh start or one from
    a checkpoint that lies elsewhere; of the run that goes on, the checkpoints past `start`. So
    nothing is lost, and nothing is mistaken for this run's.
    """
    directory = output_directory(config)
    directory.mkdir(parents=True, exist_ok=True)
    found = preparation.start
    own = found and Path(found.directory).resolve().parent == (directory / "checkpoints").resolve()
    if not own:
        for name in ("checkpoints", "metrics.jsonl", "tensorboard"):
            _set_aside(directory / name)
    else:
        checkpoints.set_aside_after(start, directory / "checkpoints")
    write_atomically(directory / "config.yaml", resolved_yaml(config, preparation).encode())
    return MetricsLog(
        directory, after=start if start else None, tensorboard=config.output.tensorboard
    )


def resolved_yaml(config: Config, preparation: Preparation) -> str:
    """The configuration with the placement that was chosen."""
    sharding = replace(config.sharding, base=preparation.placement.base)  # type: ignore[arg-type]
    return dump_yaml(replace(config, sharding=sharding))


def _shared(runtime: Runtime, checkpoint: Checkpoint | None) -> Checkpoint | None:
    """Rank 0's checkpoint on every rank."""
    if runtime.world == 1:
        return checkpoint
    described: Any = None
    if checkpoint is not None:
        described = [_describe(checkpoint.tensors), _describe(checkpoint.optimizer)]
        described.append(checkpoint.state)
    described = runtime.broadcast("checkpoint", described)
    if described is None:
        return None
    if checkpoint is None:
        tensors, optimizer, state = described
        checkpoint = Checkpoint(_empty(tensors), _empty(optimizer), state)
    for group in (checkpoint.tensors, checkpoint.optimizer):
        for tensor in group.values():
            dist.broadcast(tensor, src=0)
    return checkpoint


def _describe(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    return {n: [list(t.shape), str(t.dtype).removeprefix("torch.")] for n, t in tensors.items()}


def _empty(described: Mapping[str, Any]) -> dict[str, Tensor]:
    return {n: torch.empty(s, dtype=getattr(torch, d)) for n, (s, d) in described.items()}


def _set_aside(path: Path) -> None:
    if path.exists():
        os.rename(path, unused_name(path))
