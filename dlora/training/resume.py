"""Puts a checkpoint back into the parts of a run, and opens `output.dir` for it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from dlora.checkpoint import format as checkpoints
from dlora.checkpoint.format import Checkpoint
from dlora.checkpoint.host_copy import restore
from dlora.checkpoint.listing import set_aside_after
from dlora.checkpoint.remote import remote_of
from dlora.errors import UsageError, dtype_name
from dlora.io.files import finish_replacing, unused_name, write_atomically
from dlora.methods.trained_replica import REFERENCE, TrainedReplica
from dlora.metrics.events import EVENTS
from dlora.metrics.log import MetricsLog
from dlora.registry import room
from dlora.runtime.agreement import agree, broadcast
from dlora.runtime.console import console
from dlora.runtime.ranks import Ranks
from dlora.training.context import BEST, CHECKPOINTS, SavedRun


def resume(context: SavedRun) -> int:
    """Restore the checkpoint that `prepare` chose; returns the step that is done (0: fresh).

    Rank 0 reads; the tensors are broadcast one by one, so that no other rank needs to see its disk
    or stores more of the optimizer's state than its own.

    Raises:
        UsageError: on every rank, if the checkpoint is damaged or its state does not fit the
            optimizer.
    """
    ranks, replica, optimizer = context.ranks, context.replica, context.optimizer

    def find() -> tuple[Checkpoint | None, str]:
        resumed = context.prepared.resumed
        return (checkpoints.read(Path(resumed.directory)) if resumed and ranks.main else None), ""

    checkpoint = agree(ranks, "resume", find)
    described = broadcast(ranks, "resume/content", checkpoint and _described(checkpoint))
    if described is None:
        return 0
    step, states = int(described["step"]), described["states"]

    def shared(file: str) -> Iterator[tuple[str, Tensor]]:
        return _shared(ranks, states.get(file, {}), checkpoint and checkpoint.states.get(file, {}))

    replica.method.load_record(step, described["record"])
    _check_states(states, replica, optimizer)
    restore(
        _shared(ranks, described["tensors"], checkpoint and checkpoint.tensors),
        shared("optimizer"),
        replica,
        optimizer,
        replica.frozen,
    )
    if replica.reference:
        if REFERENCE not in states:
            raise UsageError(
                "output.resume: the checkpoint has no copy of the adapter that the run began with, "
                "which dpo.reference asks for"
            )
        replica.load_reference(shared(REFERENCE))
    for file in states:
        if file not in ("optimizer", REFERENCE):
            replica.method.load_tensors(file, shared(file))
    console.info(f"resuming after step {step}")
    return step


def restore_adapters(context: SavedRun, checkpoint: Checkpoint | None) -> None:
    """Give the adapters, not the optimizer, the values of a checkpoint that rank 0 has read."""
    ranks, replica = context.ranks, context.replica
    described = broadcast(ranks, "restore/content", checkpoint and _described(checkpoint))
    own = None if checkpoint is None else checkpoint.tensors
    tensors = _shared(ranks, described["tensors"], own)
    restore(tensors, (), replica, context.optimizer, replica.frozen)


def _check_states(
    states: Mapping[str, Mapping[str, Any]], replica: TrainedReplica, optimizer: Optimizer
) -> None:
    """Check that the states of optimizer and method have the form that a run writes.

    Torch accepts a state of any shape, and fails or broadcasts it some steps later.

    Raises:
        UsageError: a shape or dtype is another, on every rank alike.
    """
    moments = getattr(optimizer, "moment_shapes", {})
    for file, described in states.items():
        for key, (shape, dtype) in described.items():
            name, _, slot = key.rpartition(".")
            parameter = replica.named.get(name)
            if parameter is None:
                raise UsageError(f"output.resume: {file}.safetensors: {name} is not trained here")
            stored = optimizer.state.get(parameter, {}).get(slot)
            wanted = [list(parameter.shape), dtype_name(parameter.dtype)]
            if isinstance(stored, Tensor):  # of an optimizer that makes its state at once
                wanted = [list(stored.shape), dtype_name(stored.dtype)]
            elif slot == "step":
                wanted = [[], "float32"]
            elif file == "optimizer":
                wanted[0] = list(moments.get(parameter, parameter.shape))
            if [shape, dtype] != wanted:
                raise UsageError(
                    f"output.resume: {file}.safetensors of the checkpoint has {key} as {dtype} "
                    f"{shape}, where a run writes {wanted[1]} {wanted[0]}"
                )


def open_directory(context: SavedRun, start: int) -> MetricsLog:
    """Write `config.yaml` and open the metrics; rank 0 only.

    What another run left in the directory is renamed, all of it before a fresh start or where the
    checkpoint is in another directory; of the run that resumes, the checkpoints past `start`. So
    nothing is lost, and nothing is mistaken for this run's.
    """
    directory, config = context.directory, context.config
    set_aside_others(context, start)
    if (remote := remote_of(config)) is not None:
        remote.set_aside(start)
    write_atomically(directory / "config.yaml", context.settings().encode())
    return MetricsLog(
        directory,
        after=start if start else None,
        tensorboard=config.output.tensorboard,
        warn=console.warning,
    )


def open_joint_directory(context: SavedRun, start: int) -> None:
    """Write `config.yaml` of a run of several adapters, whose metrics have their own directories;
    rank 0 does. What another run left is renamed."""
    if context.ranks.main:
        set_aside_others(context, start)
        write_atomically(context.directory / "config.yaml", context.settings().encode())


def set_aside_others(context: SavedRun, start: int) -> None:
    """Make the directory of a run, and rename what is there and not this run's."""
    context.lock.check()
    directory = context.directory
    directory.mkdir(parents=True, exist_ok=True)
    if context.continues:
        set_aside_after(start, directory / CHECKPOINTS)
        return
    says = [part.says for part in room("lora.variants").values()]
    of_methods = [name for said in says for name in said.get("run_files", ())]
    finish_replacing(directory / BEST)
    own = [CHECKPOINTS, BEST, "metrics.jsonl", EVENTS, *dict.fromkeys(of_methods), "tensorboard"]
    for name in own:
        _set_aside(directory / name)


def _described(checkpoint: Checkpoint) -> dict[str, Any]:
    """Its step, and names, shapes and dtypes of its tensors."""

    def of(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        return {name: [list(t.shape), dtype_name(t.dtype)] for name, t in tensors.items()}

    return {
        "step": checkpoint.state["step"],
        "tensors": of(checkpoint.tensors),
        "states": {file: of(tensors) for file, tensors in checkpoint.states.items()},
        "record": checkpoint.record,
    }


def _shared(
    ranks: Ranks, described: Mapping[str, Any], tensors: Mapping[str, Tensor] | None
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of rank 0, which alone has them, on every rank; each is freed before the next.

    Collective until it is exhausted.
    """
    for name, (shape, dtype) in described.items():
        tensor = (
            torch.empty(shape, dtype=getattr(torch, dtype)) if tensors is None else tensors[name]
        )
        if ranks.world > 1 and tensor.numel():
            dist.broadcast(tensor, src=0)
        yield name, tensor


def _set_aside(path: Path) -> None:
    if path.exists():
        os.rename(path, unused_name(path))
