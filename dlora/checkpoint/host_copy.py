"""Copies the state of a run into host memory for a checkpoint, and back.

A save takes all tensors of a device and dtype together: hundreds of small copies would each wait
for the GPU.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from dlora.checkpoint.format import Checkpoint
from dlora.checkpoint.host_room import ADAPTER, Key, copied
from dlora.sharding.replica.optimizer_state import StateDevices, States
from dlora.sharding.replica.replica import Replica


def capture(
    replica: Replica,
    states: Mapping[str, States],
    state: dict[str, Any],
    record: dict[str, Any] | None = None,
    frozen: Mapping[str, Tensor] | None = None,
) -> Checkpoint | None:
    """Copy the trained tensors and their states to host memory.

    Any rank may do so alone. Where the optimizer state is divided over ranks it is collective, and
    only rank 0 gets a checkpoint: it receives the tensors of the state one by one. A tensor without
    elements has no state in a checkpoint: divided, no rank would have it.

    Args:
        states: {name of the file: states of this rank}.
        state: the content of `state.json`.
        record: what the adapters' method records beside tensors, for the manifest.
        frozen: the frozen tensors of the adapters.

    Returns:
        The checkpoint; None on the other ranks where the state is divided.
    """
    tensors: dict[Key, Tensor] = {}
    received: dict[str, dict[str, Tensor]] = {file: {} for file in states}
    for file, kept in states.items():
        for name, slot, value in replica.strategy.gather_full(kept):
            if not replica.named[name].numel():
                continue
            if replica.strategy.collective_saves:  # so that one whole tensor at a time is there
                received[file][f"{name}.{slot}"] = value.cpu()
            else:
                tensors[file, f"{name}.{slot}"] = value
    if replica.strategy.collective_saves and replica.topology.rank != 0:
        return None
    tensors |= {(ADAPTER, n): t.detach() for n, t in {**replica.named, **(frozen or {})}.items()}
    content = copied(tensors).content([ADAPTER, *states])
    whole = {file: content[file] | received[file] for file in states}
    return Checkpoint(content[ADAPTER], whole, state, record)


def restore(
    tensors: Iterable[tuple[str, Tensor]],
    states: Iterable[tuple[str, Tensor]],
    replica: Replica,
    optimizer: Optimizer,
    frozen: Mapping[str, Tensor] | None = None,
) -> None:
    """Copy the tensors of a checkpoint, one by one, into the adapters and the optimizer.

    Args:
        tensors, states: (name, whole tensor) of the adapters, and of the optimizer.
        frozen: as for `capture`.
    """
    places = {**replica.named, **(frozen or {})}
    with torch.no_grad():
        for name, value in tensors:
            places[name].copy_(value)
    devices = StateDevices(optimizer)
    for key, value in states:
        name, _, slot = key.rpartition(".")
        own = replica.strategy.local_part(name, value)
        if own is not None:
            parameter = replica.optimized[name]
            kept = optimizer.state[parameter].get(slot)
            if isinstance(kept, Tensor) and (kept.shape, kept.dtype) == (own.shape, own.dtype):
                kept.copy_(own)  # into memory that only this optimizer can allocate
                continue
            device = devices.of(parameter, own)
            optimizer.state[parameter][slot] = own.to(device, copy=True)
