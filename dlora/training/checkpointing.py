"""What a rank saves of a run: at its due steps, and when it is left alone.

save     the step that was just made, copied at once and written by a thread of its own; rank 0
         alone, unless ranks keep different optimizer states
keep     every step: a snapshot in this rank's host memory
commit   the snapshot becomes a checkpoint: any rank, no collective, from any thread
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.optim import Optimizer

from dlora.api import TrainedReplica
from dlora.checkpoint import format as checkpoints
from dlora.checkpoint.format import Checkpoint
from dlora.checkpoint.host_copy import capture
from dlora.checkpoint.remote import RemoteCheckpoints, remote_of
from dlora.checkpoint.snapshot import Snapshots
from dlora.config.load import Config
from dlora.errors import UsageError
from dlora.hooks import NO_HOOKS, Committed, Hooks, Saved, nothing
from dlora.methods.adalora_report import RankHistory
from dlora.metrics.log import complete
from dlora.runtime.ranks import Runtime
from dlora.sharding.replica.optimizer_state import ReplicaError
from dlora.training.find_checkpoint import output_directory, state_at
from dlora.training.prepare import Preparation
from dlora.training.resume import resolved_yaml

# What gloo and torch say where a peer, or the way to it, is gone.
_LOST = ("gloo", "Connection closed by peer", "Connection reset by peer", "Broken pipe")
RESUMES = "the same command resumes from there"


class CheckpointManager:
    """Saves one run.

    Args:
        start: the step that it goes on from.
        hooks: told of saves, and of peers that are lost.

    Attributes:
        masks: what AdaLoRA's masks were.
    """

    def __init__(
        self,
        config: Config,
        runtime: Runtime,
        preparation: Preparation,
        replica: TrainedReplica,
        optimizer: Optimizer,
        start: int,
        hooks: Hooks = NO_HOOKS,
    ) -> None:
        self._config, self._runtime, self._prepared = config, runtime, preparation
        self._replica, self._optimizer, self._start = replica, optimizer, start
        self._root = output_directory(config) / "checkpoints"
        self._remote, self._hooks = remote_of(config), hooks
        self.masks = RankHistory(self._root.parent, replica.allocator)
        self._snapshots = Snapshots()
        self._record: dict[str, Any] = {}  # of the snapshot's step
        self._lock = threading.Lock()  # while a snapshot is written or read
        self._writing = threading.Lock()  # one checkpoint at a time
        self._writer = ThreadPoolExecutor(1, "dlora-save")
        self._pending: Future[Saved | None] | None = None

    def save(self, step: int, record: dict[str, Any]) -> None:
        """Commit a checkpoint: rank 0 alone, unless ranks keep different optimizer states.

        What the disk refuses is said, and tried again at the next save: the run goes on.

        Args:
            record: the step's line of the metrics.
        """
        replica = self._replica
        committed: Committed = nothing
        if self._runtime.main or replica.strategy.collective_saves:
            states, allocation = replica.states(self._optimizer), replica.allocation()
            captured = capture(replica, states, self._state(step), allocation, replica.frozen)
            if captured is not None:
                self.settle()
                with self._said_of_disk(step):
                    self.masks.write(until=step)
                self._pending = self._writer.submit(self._write_behind, captured)
                committed = self._pending.result
        self._hooks.saved(record, committed)

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Inside, saves are written behind; with its end, however it comes, they are written."""
        try:
            yield
        finally:
            self.settle()

    def settle(self) -> None:
        """Wait for what is being written."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def keep(self, step: int, record: dict[str, Any]) -> None:
        """Take a snapshot after a step, with its line of the metrics.

        There is none where ranks keep different optimizer states: no rank has all of it.
        """
        if not self._replica.strategy.collective_saves:
            with self._lock:
                self._snapshots.take(step, self._replica, self._optimizer)
                self._record = record

    def commit(self, *, ending: bool) -> str:
        """Commit the snapshot, unless its step is committed already; returns what to say about it.

        Args:
            ending: the process will write nothing more, so the step's metrics belong to it as well.
        """
        with self._lock:
            snapshot = self._snapshots.newest()
            if snapshot is None:
                return self._nothing()
            step = snapshot.step
            directory = self._root / f"step-{step:06d}"
            try:
                checkpoints.verify(directory)
            except UsageError:
                self.masks.write(until=step)
                self._push(self._write(snapshot.checkpoint(self._state(step))))
            every = self._config.output.log_every
            if ending and every and step % every == 0 and self._record["step"] == step:
                complete(self._root.parent / "metrics.jsonl", self._record)
        return f"step {step} is committed in {directory}; {RESUMES}"

    def alone(self, *, ending: bool) -> str:
        """`commit`, for a rank whose peers are no help; whatever goes wrong becomes the line."""
        try:
            said = self.commit(ending=ending)
        except Exception as error:
            said = f"the last whole step could not be committed: {error}"
        return f"dlora: rank {self._runtime.rank}: {said}"

    def survive(self, work: Callable[[], int]) -> int:
        """The exit status of `work`, which runs with other ranks; 1 where one of them was lost.

        Whatever torch raises, the last whole step is committed.
        """
        try:
            status = work()
            self._runtime.leave()
        except ReplicaError as error:  # on every rank; what they hold is wrong, so nothing is saved
            self._runtime.fail(str(error))
            return 1
        except RuntimeError as error:
            lost = isinstance(error, dist.DistError) or any(sign in str(error) for sign in _LOST)
            said, reason = self.alone(ending=True), str(error).strip().split("\n")[0]
            lost = lost and self._runtime.told_line() is None
            print(said, f"(lost a peer: {reason})" if lost else "", file=sys.stderr, flush=True)
            if not lost:
                raise
            self._hooks.lost()
            return 1
        return status

    def _nothing(self) -> str:
        if self._replica.strategy.collective_saves:
            return "no rank holds all of the optimizer state, so the last save is what there is"
        there = f"; step {self._start} is committed" if self._start else ""
        return f"no step was made since the start{there}"

    def _state(self, step: int) -> dict[str, Any]:
        found = self._prepared
        fingerprints = found.train.fingerprint, found.base_identity
        state = state_at(step, self._config, found.lora, found.sampler, *fingerprints)
        state["ranks"] = self._runtime.world
        return state

    @contextlib.contextmanager
    def _said_of_disk(self, step: int) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._runtime.warn(f"step {step} could not be saved: {error}; the run goes on")

    def publish(self, adapter: Path) -> None:
        """Copy the adapter, which was just written, to `output.remote`; said where it refuses."""
        self._offer(adapter.name, lambda remote: remote.put(adapter))

    def _write_behind(self, checkpoint: Checkpoint) -> Saved | None:
        with self._said_of_disk(checkpoint.state["step"]):
            directory = self._write(checkpoint)
            return Saved(directory, self._push(directory))
        return None

    def _push(self, directory: Path) -> str | None:
        """Copy a checkpoint to `output.remote`; its URL there."""
        keep_last = self._config.output.keep_last
        return self._offer(directory.name, lambda remote: remote.push(directory, keep_last))

    def _offer(self, name: str, copy: Callable[[RemoteCheckpoints], object]) -> str | None:
        """Copy something to `output.remote`; its URL there.

        A store that refuses it does not end the run: that is said, and there is no URL.
        """
        if self._remote is None:
            return None
        try:
            copy(self._remote)
        except Exception as error:  # every store has exceptions of its own
            self._runtime.warn(
                f"{name} could not be copied to {self._remote.url}: {error}; the run goes on"
            )
            return None
        return f"{self._remote.url}/{name}"

    def _write(self, checkpoint: Checkpoint) -> Path:
        with self._writing:
            return checkpoints.write(
                checkpoint,
                self._root,
                resolved_yaml(self._config, self._prepared),
                self._config.output.keep_last,
                rank=self._runtime.rank,
            )
