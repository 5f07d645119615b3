"""Host snapshots of a rank: the last whole optimizer step, ready to be saved at any moment.

    one buffer  ──take(step)──>  ( being written )      the other  ( whole, the step before )
    newest()    the buffer of the latest step that is whole

Two buffers alternate, so that a failure while one is written leaves the other whole. Each has all
tensors of a kind in one flat tensor: one operation concatenates them, and one copies them from a
GPU into pinned memory, asynchronously; an event records its end.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dlora.checkpoint.format import Checkpoint
from dlora.sharding.replica.optimizer_state import States
from dlora.sharding.replica.replica import Replica

Key = tuple[str, str]  # file, name in it
Kind = tuple[torch.device, torch.dtype]
Layout = list[tuple[Key, torch.Size, Kind]]
ADAPTER = "adapter"


class Snapshots:
    """The two buffers of a rank; allocated at the first step, and again when shapes change."""

    def __init__(self) -> None:
        self._older, self._newer = _Buffer(), _Buffer()
        self._frozen: dict[str, Tensor] | None = None  # the same at every step: copied once

    def take(
        self,
        step: int,
        replica: Replica,
        *,
        states: Mapping[str, States],
        record: dict[str, Any] | None,
        frozen: Mapping[str, Tensor],
    ) -> None:
        """Copy what a checkpoint after `step` steps has, over the older of the two snapshots.

        On a GPU the copy may still be on its way when this returns. The other arguments are those
        of `dlora.checkpoint.host_copy.capture`.
        """
        tensors = {(ADAPTER, name): p.detach() for name, p in replica.named.items()}
        for file, kept in states.items():
            for name, slot, state in replica.strategy.gather_full(kept):
                tensors[file, f"{name}.{slot}"] = state
        files = [ADAPTER, *states]
        self._newer.wait()  # the only whole one from here on
        if self._frozen is None:
            self._frozen = {n: t.to("cpu", copy=True) for n, t in frozen.items()}
        self._older.fill(step, tensors, files, record, self._frozen)
        self._older, self._newer = self._newer, self._older

    def newest(self) -> Snapshot | None:
        """The snapshot of the latest step that is whole; None before the first step."""
        return self._newer.content() or self._older.content()


@dataclass(frozen=True)
class Snapshot:
    """The content of a checkpoint of `step`, without its `state.json`, which follows from it."""

    step: int
    files: dict[str, dict[str, Tensor]]
    record: dict[str, Any] | None

    def checkpoint(self, state: dict[str, Any]) -> Checkpoint:
        """The checkpoint of this step, as `dlora.checkpoint.host_copy.capture` makes it."""
        states = {file: tensors for file, tensors in self.files.items() if file != ADAPTER}
        return Checkpoint(self.files[ADAPTER], states, state, self.record)


@dataclass
class _Buffer:
    """One snapshot and its memory."""

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
        record: dict[str, Any] | None,
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
        content: dict[str, dict[str, Tensor]] = {file: {} for file in files}
        for (file, name), view in self.views.items():
            content[file][name] = view
        content[ADAPTER] |= frozen
        self.snapshot = Snapshot(step, content, record)

    def content(self) -> Snapshot | None:
        """The snapshot, if its copy is finished."""
        finished = self.arrived is None or self.arrived.query()
        return self.snapshot if finished else None

    def wait(self) -> None:
        """Wait until the copy is finished."""
        if self.arrived is not None:
            self.arrived.synchronize()

    def _lay_out(self, layout: Layout) -> None:
        sizes: dict[Kind, int] = {}
        places: dict[Key, tuple[Kind, int]] = {}
        for key, shape, kind in layout:
            places[key] = kind, sizes.setdefault(kind, 0)
            sizes[kind] += shape.numel()
        self.layout, self.flat, self.views = [], {}, {}  # free the old before allocating the new
        for kind, size in sizes.items():
            pinned = kind[0].type == "cuda"
            self.flat[kind] = torch.empty(size, dtype=kind[1], pin_memory=pinned)
        for key, shape, _ in layout:
            kind, start = places[key]
            self.views[key] = self.flat[kind][start : start + shape.numel()].view(shape)
        self.layout = layout
