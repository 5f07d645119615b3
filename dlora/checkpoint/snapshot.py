"""Host snapshots of a rank: the last whole optimizer step, ready to be saved at any moment.

    one buffer  ──take(step)──>  ( being written )      the other  ( whole, the step before )
    newest()    the buffer of the latest step that is whole

Two buffers alternate, so that a failure while one is written leaves the other whole. Each has all
tensors of a kind in one flat tensor. From a GPU they arrive beside its work (`device_copy.py`), and
an event tells when: it may never arrive where the GPU waits for a lost peer, and after a fault of
the GPU it cannot be asked. So whoever reads a snapshot never waits for the thread that takes them.
"""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dlora.checkpoint.device_copy import DeviceCopies, pinned
from dlora.checkpoint.format import Checkpoint
from dlora.checkpoint.host_room import ADAPTER, HostRoom, Key, copied, pageable
from dlora.sharding.replica.optimizer_state import States
from dlora.sharding.replica.replica import Replica

KEEPERS = 2  # ranks of a node that keep snapshots


class Snapshots:
    """The two buffers of a rank; allocated at the first step, and again when shapes change."""

    def __init__(self) -> None:
        self._newest_first = _Buffer(), _Buffer()
        self._frozen: dict[str, Tensor] | None = None  # the same at every step: copied once
        self._copies: dict[torch.device, DeviceCopies] = {}

    def take(
        self,
        step: int,
        metrics: dict[str, Any],
        replica: Replica,
        *,
        states: Mapping[str, States],
        record: dict[str, Any] | None,
        frozen: Mapping[str, Tensor],
        state: dict[str, Any],
    ) -> None:
        """Copy what a checkpoint after `step` steps has, over the older of the two snapshots.

        On a GPU the copy may still be on its way when this returns: `before_change` comes before
        anything that changes the tensors.

        Args:
            metrics: the step's line of the metrics.
            states, record, frozen, state: as for `dlora.checkpoint.host_copy.capture`.
        """
        tensors = {(ADAPTER, name): p.detach() for name, p in replica.named.items()}
        for file, kept in states.items():
            for name, slot, tensor in replica.strategy.gather_full(kept):
                tensors[file, f"{name}.{slot}"] = tensor
        files = [ADAPTER, *states]
        newer, older = self._newest_first
        newer.wait()  # the only whole one from here on
        if self._frozen is None or self._frozen.keys() != frozen.keys():
            room = copied({(ADAPTER, name): t.detach() for name, t in frozen.items()})
            self._frozen = room.content([ADAPTER])[ADAPTER]
        with older.lock:
            older.give_up()
            older.room.lay_out(tensors)
            older.fill(tensors, self._copies_of)
            content = older.room.content(files)
            content[ADAPTER] |= self._frozen
            older.snapshot = Snapshot(step, metrics, content, record, state)
        self._newest_first = older, newer

    def before_change(self) -> None:
        """What is enqueued on a GPU from here on waits until the snapshot's copies are made."""
        for copies in self._copies.values():
            copies.wait_on_device()

    def look(self) -> None:
        """Note whether the newest has arrived: after a fault of the GPU nobody could tell."""
        self._newest_first[0].has_arrived()

    @contextlib.contextmanager
    def newest(self) -> Iterator[Snapshot | None]:
        """The snapshot of the latest step that is whole, which stays as it is inside.

        None before the first step. Any thread may ask, one at a time.
        """
        # Each twice: while the first is looked at, the training thread may begin to fill the other.
        for buffer in 2 * self._newest_first:
            if buffer.lock.acquire(blocking=False):
                try:
                    if buffer.snapshot is not None and buffer.has_arrived():
                        yield buffer.snapshot
                        return
                finally:
                    buffer.lock.release()
        yield None

    def _copies_of(self, device: torch.device) -> DeviceCopies:
        if device not in self._copies:
            self._copies[device] = DeviceCopies(device)
        return self._copies[device]


@dataclass(frozen=True)
class Snapshot:
    """The content of a checkpoint of `step`.

    Attributes:
        metrics: the step's line of the metrics.
        state: of that step, whatever has happened to the run since.
    """

    step: int
    metrics: dict[str, Any]
    files: dict[str, dict[str, Tensor]]
    record: dict[str, Any] | None
    state: dict[str, Any]

    def checkpoint(self) -> Checkpoint:
        """The checkpoint of this step, as `dlora.checkpoint.host_copy.capture` makes it."""
        states = {file: tensors for file, tensors in self.files.items() if file != ADAPTER}
        return Checkpoint(self.files[ADAPTER], states, self.state, self.record)


@dataclass
class _Buffer:
    """One snapshot and its memory.

    Attributes:
        lock: held while the snapshot is replaced or read.
        arriving: the event after which its copies from a GPU have arrived, until that was seen.
    """

    room: HostRoom = field(default_factory=lambda: HostRoom(_memory))
    snapshot: Snapshot | None = None
    arriving: torch.cuda.Event | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)

    @torch.no_grad()
    def fill(
        self, tensors: dict[Key, Tensor], copies_of: Callable[[torch.device], DeviceCopies]
    ) -> None:
        """Copy the tensors, from a GPU without waiting for the copies' end."""
        for flat, parts in self.room.parts(tensors):
            device = parts[0].device
            if device.type == "cpu":
                torch.cat(parts, out=flat)
            else:
                self.arriving = copies_of(device).start(parts, flat)

    def has_arrived(self) -> bool:
        """Whether all copies have; an event that has come is not asked again."""
        if (arriving := self.arriving) is not None:
            try:
                if not arriving.query():
                    return False
            except RuntimeError:  # a fault of the GPU, which every later call reports
                return False
            self.arriving = None
        return True

    def wait(self) -> None:
        """Wait until all copies have arrived."""
        if (arriving := self.arriving) is not None:
            arriving.synchronize()
            self.arriving = None

    def give_up(self) -> None:
        """What it has may be overwritten from here on."""
        self.snapshot, self.arriving = None, None


def _memory(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Host memory for what comes from a device; where it cannot be pinned copies are slower."""
    if device.type != "cpu":
        try:
            return pinned(size, dtype)
        except RuntimeError as error:
            warnings.warn(f"{size * dtype.itemsize} B could not be pinned: {error}", stacklevel=2)
    return pageable(size, dtype, device)
