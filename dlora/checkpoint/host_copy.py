"""Between a run and the content of its checkpoints: copied to host memory, and put back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from dlora.checkpoint.format import Checkpoint
from dlora.sharding.replica.optimizer_state import States
from dlora.sharding.replica.replica import Replica


def capture(
    replica: Replica,
    states: Mapping[str, States],
    state: dict[str, Any],
    allocation: dict[str, Any] | None = None,
    frozen: Mapping[str, Tensor] | None = None,
) -> Checkpoint | None:
    """Copy the trained tensors and what is kept beside them to host memory.

    Any rank may do so alone. Where the optimizer state is divided it is collective, and only rank 0
    gets a checkpoint: the tensors of the state arrive one by one, and no other rank holds any.
    Beside a tensor without elements nothing is kept: divided, no rank would have it.

    Args:
        states: of this rank, by the names of their files.
        frozen: what the adapters have beside what is trained.
    """
    whole = {
        file: {
            f"{name}.{slot}": _host(value)
            for name, slot, value in replica.strategy.gather_full(kept)
            if replica.named[name].numel()
        }
        for file, kept in states.items()
    }
    if replica.strategy.collective_saves and replica.topology.rank != 0:
        return None
    kept = {**replica.named, **(frozen or {})}
    tensors = {name: _host(tensor.detach()) for name, tensor in kept.items()}
    return Checkpoint(tensors, whole, state, allocation)


def restore(
    tensors: Iterable[tuple[str, Tensor]],
    states: Iterable[tuple[str, Tensor]],
    replica: Replica,
    optimizer: Optimizer,
    frozen: Mapping[str, Tensor] | None = None,
) -> None:
    """Put the tensors of a checkpoint that fits, one by one, into the adapters and the optimizer.

    Args:
        frozen: as for `capture`.
    """
    places = {**replica.named, **(frozen or {})}
    with torch.no_grad():
        for name, value in tensors:
            places[name].copy_(value)
    for key, value in states:
        name, _, slot = key.rpartition(".")
        own = replica.strategy.local_part(name, value)
        if own is not None:
            parameter = replica.optimized[name]
            kept = optimizer.state[parameter].get(slot)
            if isinstance(kept, Tensor) and (kept.shape, kept.dtype) == (own.shape, own.dtype):
                kept.copy_(own)  # it may lie where this optimizer alone can put it
                continue
            # A step count stays where torch keeps it: on the CPU unless the optimizer says so.
            device = parameter.device if value.ndim else "cpu"
            optimizer.state[parameter][slot] = own.to(device, copy=True)


def _host(tensor: Tensor) -> Tensor:
    return tensor.to("cpu", copy=True).contiguous()
