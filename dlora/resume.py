"""Where a run starts from: the directory of an earlier one, checked, or an empty one."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml
from torch import Tensor
from torch.optim import Optimizer

from dlora import checkpoint as checkpoints
from dlora.checkpoint import Checkpoint
from dlora.config import Config, dump_yaml, to_dict
from dlora.errors import UsageError
from dlora.files import write_atomically
from dlora.metrics import MetricsLog
from dlora.prepare import Preparation
from dlora.runtime import Runtime
from dlora.sharding.replica import Replica

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
    replica: Replica,
    optimizer: Optimizer,
) -> int:
    """Restore the checkpoint that `output.resume` means; returns the step to go on from (0: fresh).

    Rank 0 reads; the tensors are broadcast one by one, so that no other rank needs to see its disk
    or holds more of the optimizer's state than its own.

    Raises:
        UsageError: on every rank, if the checkpoint is damaged or belongs to another run.
    """

    def find() -> tuple[Checkpoint | None, str]:
        found = _find(config, preparation, runtime) if runtime.main else None
        if found is not None:
            checkpoints.check_fits(found, replica.named)
        return found, ""

    checkpoint = runtime.agree("resume", find)
    described = runtime.broadcast("checkpoint", checkpoint and _described(checkpoint))
    if described is None:
        return 0
    checkpoints.restore(
        _shared(runtime, described["tensors"], checkpoint and checkpoint.tensors),
        _shared(runtime, described["optimizer"], checkpoint and checkpoint.optimizer),
        replica,
        optimizer,
    )
    step = int(described["step"])
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
    sharding = replace(
        config.sharding,
        engine=preparation.placement.engine,  # type: ignore[arg-type]
        base=preparation.placement.base,  # type: ignore[arg-type]
        optimizer_state="divided" if preparation.divided else "replicated",
    )
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


def _described(checkpoint: Checkpoint) -> dict[str, Any]:
    """Its step, and names, shapes and dtypes of its tensors."""

    def of(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        return {n: [list(t.shape), str(t.dtype).removeprefix("torch.")] for n, t in tensors.items()}

    return {
        "step": checkpoint.state["step"],
        "tensors": of(checkpoint.tensors),
        "optimizer": of(checkpoint.optimizer),
    }


def _shared(
    runtime: Runtime, described: Mapping[str, Any], tensors: Mapping[str, Tensor] | None
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of rank 0, which alone has them, on every rank; each is let go of for the next.

    Collective until it is exhausted.
    """
    for name, (shape, dtype) in described.items():
        tensor = (
            torch.empty(shape, dtype=getattr(torch, dtype)) if tensors is None else tensors[name]
        )
        if runtime.world > 1:
            dist.broadcast(tensor, src=0)
        yield name, tensor


def _set_aside(path: Path) -> None:
    if not path.exists():
        return
    number = 1
    while (aside := path.with_name(f"{path.name}.old-{number}")).exists():
        number += 1
    os.rename(path, aside)
