"""Host snapshots of a rank: the last whole optimizer step, ready to be committed at any moment.

    one buffer  ──take(step)──>  ( being written )      the other  ( whole, the step before )
    newest()    the buffer of the latest step that is whole

There are two buffers by turns, so that whatever fails while one is written leaves the other. Each
holds all tensors of a kind in one stretch: gathered by one operation, and from a GPU copied by one,
into pinned memory, behind the step's own work; an event then tells whether it has arrived.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from dlora.api import TrainedReplica
from dlora.checkpoint.format import Checkpoint

Key = tuple[str, str]  # file, name in it
Kind = tuple[torch.device, torch.dtype]
Layout = list[tuple[Key, torch.Size, Kind]]
ADAPTER = "adapter"


class Snapshots:
    """The two buffers of a rank; they are made at the first step, and again when shapes change."""

    def __init__(self) -> None:
        self._older, self._newer = _Buffer(), _Buffer()
        self._frozen: dict[str, Tensor] | None = None  # the same at every step: copied once

    def take(self, step: int, replica: TrainedReplica, optimizer: Optimizer) -> None:
        """Copy what a checkpoint after `step` steps holds, over the older of the two snapshots.

        On a GPU the copy may still be on its way when this returns.
        """
        tensors = {(ADAPTER, name): p.detach() for name, p in replica.named.items()}
        for file, kept in replica.states(optimizer).items():
            for name, slot, state in replica.strategy.gather_full(kept):
                tensors[file, f"{name}.{slot}"] = state
        files = [ADAPTER, *replica.states(optimizer)]
        self._newer.wait()  # the only whole one from here on
        if self._frozen is None:
            self._frozen = {n: t.to("cpu", copy=True) for n, t in replica.frozen.items()}
        self._older.fill(step, tensors, files, replica.allocation(), self._frozen)
        self._older, self._newer = self._newer, self._older

    def newest(self) -> Snapshot | None:
        """The snapshot of the latest step that is whole; None where no step was."""
        return self._newer.content() or self._older.content()


@dataclass(frozen=True)
class Snapshot:
    """What a checkpoint of `step` holds, but for its `state.json`, which follows from the step."""

    step: int
    files: dict[str, dict[str, Tensor]]
    allocation: dict[str, Any] | None

    def checkpoint(self, state: dict[str, Any]) -> Checkpoint:
        """The same as `dlora.checkpoint.host_copy.capture` gives right after the step."""
        states = {file: tensors for file, tensors in self.files.items() if file != ADAPTER}
        return Checkpoint(self.files[ADAPTER], states, state, self.allocation)


@dataclass
class _Buffer:
    """One snapshot, and where it lies."""

    layout: Layout = field(default_factory=list)
    flat: dict[Kind, Tensor] = field(default_factory=dict)
    views: dict[Key, Tensor] = field(default_factory=dict)
    snapshot: Snapshot | None = None
    arrived: torch.cuda.Event | None = None

    @torch.no_grad()
    def fill(
        self,
        step: int,
        tensors: dict[Key, Tensor],
        files: list[str],
        allocation: dict[str, Any] | None,
        frozen: dict[str, Tensor],
    ) -> None:
        self.snapshot, self.arrived = None, None
        layout = [(key, t.shape, (t.device, t.dtype)) for key, t in tensors.items()]
        if layout != self.layout:
            self._lay_out(layout)
        parts: dict[Kind, list[Tensor]] = {kind: [] for kind in self.flat}
        for tensor in tensors.values():
            parts[tensor.device, tensor.dtype].append(tensor.reshape(-1))
        for kind, flat in self.flat.items():
            if kind[0].type == "cpu":
                torch.cat(parts[kind], out=flat)
            else:
                flat.copy_(torch.cat(parts[kind]), non_blocking=True)
                self.arrived = torch.cuda.Event()
        if self.arrived is not None:
            self.arrived.record()
        held: dict[str, dict[str, Tensor]] = {file: {} for file in files}
        for (file, name), view in self.views.items():
            held[file][name] = view
        held[ADAPTER] |= frozen
        self.snapshot = Snapshot(step, held, allocation)

    def content(self) -> Snapshot | None:
        """The snapshot if all of it is there."""
        there = self.arrived is None or self.arrived.query()
        return self.snapshot if there else None

    def wait(self) -> None:
        """Until all of it is there."""
        if self.arrived is not None:
            self.arrived.synchronize()

    def _lay_out(self, layout: Layout) -> None:
        sizes: dict[Kind, int] = {}
        places: dict[Key, tuple[Kind, int]] = {}
        for key, shape, kind in layout:
            places[key] = kind, sizes.setdefault(kind, 0)
            sizes[kind] += shape.numel()
        self.layout, self.flat, self.views = [], {}, {}  # let go of the old before there is a new
        for kind, size in sizes.items():
            pinned = kind[0].type == "cuda"
            self.flat[kind] = torch.empty(size, dtype=kind[1], pin_memory=pinned)
        for key, shape, _ in layout:
            kind, start = places[key]
            self.views[key] = self.flat[kind][start : start + shape.numel()].view(shape)
        self.layout = layout
