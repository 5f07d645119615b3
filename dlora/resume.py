"""Where a run starts from: the directory of an earlier one, checked, or an empty one."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml
from torch import Tensor, nn
from torch.optim import Optimizer

from dlora import checkpoint as checkpoints
from dlora.checkpoint import Checkpoint
from dlora.config import Config, dump_yaml, to_dict
from dlora.errors import UsageError
from dlora.files import write_atomically
from dlora.metrics import MetricsLog
from dlora.prepare import Preparation
from dlora.runtime import Runtime

# Keys that may change between a run and its continuation: they do not alter the result.
FREE_KEYS = {
    "model.cache_dir",
    "adapter.path",
    "data.train",  # what the files hold is compared, not what they are called
    "data.eval",
    "train.max_steps",
    "train.epochs",
    "train.micro_batch_size",
}
FREE_SECTIONS = {"sharding", "output"}


def resume(
    config: Config,
    runtime: Runtime,
    preparation: Preparation,
    named: Mapping[str, nn.Parameter],
    optimizer: Optimizer,
) -> int:
    """Restore the checkpoint that `output.resume` means; returns the step to go on from (0: fresh).

    Rank 0 reads; the tensors are broadcast, so that no other rank needs to see its disk.

    Raises:
        UsageError: on every rank, if the checkpoint is damaged or belongs to another run.
    """

    def find() -> tuple[Checkpoint | None, str]:
        found = _find(config, preparation, runtime) if runtime.main else None
        if found is not None:
            checkpoints.check_fits(found, named)
        return found, ""

    checkpoint = _shared(runtime, runtime.agree("resume", find))
    if checkpoint is None:
        return 0
    checkpoints.restore(checkpoint, named, optimizer)
    step = int(checkpoint.state["step"])
    runtime.say(f"resuming after step {step}")
    return step


def open_directory(config: Config, preparation: Preparation, start: int) -> MetricsLog:
    """Write `config.yaml` and open the metrics; rank 0 only.

    A fresh start in a used directory sets the earlier checkpoints aside: nothing is lost, and none
    of them is mistaken for this run's.
    """
    directory = Path(config.output.dir)
    directory.mkdir(parents=True, exist_ok=True)
    if start == 0:
        _set_aside(directory / "checkpoints")
        _set_aside(directory / "metrics.jsonl")
        _set_aside(directory / "tensorboard")
    write_atomically(directory / "config.yaml", resolved_yaml(config, preparation).encode())
    return MetricsLog(
        directory, after=start if start else None, tensorboard=config.output.tensorboard
    )


def resolved_yaml(config: Config, preparation: Preparation) -> str:
    """The configuration with the placement that was chosen."""
    sharding = replace(config.sharding, base=preparation.placement.base)  # type: ignore[arg-type]
    return dump_yaml(replace(config, sharding=sharding))


def _find(config: Config, preparation: Preparation, runtime: Runtime) -> Checkpoint | None:
    wanted = config.output.resume
    if wanted == "none":
        return None
    root = Path(config.output.dir) / "checkpoints"
    directory = checkpoints.newest(root, runtime.say) if wanted == "auto" else Path(wanted)
    if directory is None:
        return None
    if not directory.is_dir():
        raise UsageError(f"output.resume: there is no checkpoint {directory}")
    checkpoint = checkpoints.read(directory)
    if not config.output.resume_force:
        _refuse_conflicts(config, preparation, checkpoint, directory)
    if checkpoint.state["step"] > preparation.sampler.total_steps:
        raise UsageError(
            f"train.max_steps: {directory} is at step {checkpoint.state['step']} already, "
            f"past the run's {preparation.sampler.total_steps}"
        )
    return checkpoint


def _refuse_conflicts(
    config: Config, preparation: Preparation, checkpoint: Checkpoint, directory: Path
) -> None:
    """Settings or data that would make the continued run another one than was begun."""
    saved = yaml.safe_load((directory / "config.yaml").read_text(encoding="utf-8"))
    conflicts = []
    for section, options in to_dict(config).items():
        for name, value in options.items() if section not in FREE_SECTIONS else ():
            key, before = f"{section}.{name}", saved.get(section, {}).get(name)
            if key not in FREE_KEYS and before != value:
                conflicts.append(f"{key} was {before!r} and is {value!r}")
    if checkpoint.state["data"]["fingerprint"] != preparation.train.fingerprint:
        conflicts.append("data.train holds other sequences")
    if conflicts:
        raise UsageError(
            f"output.resume: {directory} belongs to another run: {'; '.join(conflicts)} "
            "(output.resume: none starts afresh, output.resume_force: true goes on regardless)"
        )


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
    if not path.exists():
        return
    number = 1
    while (aside := path.with_name(f"{path.name}.old-{number}")).exists():
        number += 1
    os.rename(path, aside)
