"""What a rank saves of a run: at the steps that are due, and when peers are lost.

save      the step that was just made, copied at once and written by a thread; rank 0 alone,
          unless the optimizer state is divided over ranks
snapshot  every step: a copy in this rank's host memory
commit    the snapshot becomes a checkpoint: any rank, no collective, from any thread
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

from dlora.checkpoint import format as checkpoints
from dlora.checkpoint.format import Checkpoint
from dlora.checkpoint.host_copy import capture
from dlora.checkpoint.remote import RemoteCheckpoints, remote_of
from dlora.checkpoint.snapshot import Snapshots
from dlora.errors import UsageError
from dlora.hooks import Committed, Saved, nothing
from dlora.metrics.log import complete
from dlora.runtime.console import console
from dlora.runtime.failure import found_report
from dlora.runtime.peer_watch import PeerWatch
from dlora.sharding.replica.optimizer_state import ReplicaError
from dlora.training.context import RunContext
from dlora.training.find_checkpoint import state_at
from dlora.training.resume import resolved_yaml

# Texts of gloo's and torch's errors when the connection to a peer is lost.
_LOST = ("gloo", "Connection closed by peer", "Connection reset by peer", "Broken pipe")
RESUMES = "the same command resumes from there"


class CheckpointManager:
    """Saves one run.

    Args:
        start: the step that it resumes after.
    """

    def __init__(self, context: RunContext, start: int) -> None:
        self._context, self._start = context, start
        self._root = context.directory / "checkpoints"
        self._remote = remote_of(context.config)
        self._snapshots = Snapshots()
        self._record: dict[str, Any] = {}  # of the snapshot's step
        self._lock = threading.Lock()  # while a snapshot is written or read
        self._writing = threading.Lock()  # one checkpoint at a time
        self._writer = ThreadPoolExecutor(1, "dlora-save")
        self._pending: Future[Saved | None] | None = None

    def save(self, step: int, record: dict[str, Any]) -> None:
        """Commit a checkpoint: rank 0 alone, unless the optimizer state is divided over ranks.

        If the write fails, a warning is logged and the run continues; the next save tries again.

        Args:
            record: the step's line of the metrics.
        """
        replica = self._context.replica
        committed: Committed = nothing
        if self._context.ranks.main or replica.strategy.collective_saves:
            captured = capture(replica, state=self._state(step), **self._beside())
            if captured is not None:
                self.settle()
                with self._warning_of_disk(step):
                    self.write_method_files(step)
                self._pending = self._writer.submit(self._write_behind, captured)
                committed = self._pending.result
        self._context.hooks.saved(record, committed)

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Inside, saves are written by a thread; the block's end waits for it."""
        try:
            yield
        finally:
            self.settle()

    def settle(self) -> None:
        """Wait until the save in progress, if any, is written."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def snapshot(self, step: int, record: dict[str, Any]) -> None:
        """Copy a step to host memory, with its line of the metrics.

        There is none where the optimizer state is divided: no rank has all of it.
        """
        replica = self._context.replica
        if not replica.strategy.collective_saves:
            with self._lock:
                self._snapshots.take(step, replica, **self._beside())
                self._record = record

    def commit(self, *, ending: bool) -> str:
        """Commit the snapshot, unless its step is committed already; returns a line about it.

        Args:
            ending: the process will write nothing more, so the step's metrics are written as well.
        """
        with self._lock:
            snapshot = self._snapshots.newest()
            if snapshot is None:
                return self._nothing_to_commit()
            step = snapshot.step
            directory = self._root / f"step-{step:06d}"
            try:
                checkpoints.verify(directory)
            except UsageError:
                self._context.lock.check()
                self.write_method_files(step)
                self._push(self._write(snapshot.checkpoint(self._state(step))))
            every = self._context.config.output.log_every
            if ending and every and step % every == 0 and self._record["step"] == step:
                self._context.lock.check()
                complete(self._context.directory / "metrics.jsonl", self._record)
        return f"step {step} is committed in {directory}; {RESUMES}"

    def commit_alone(self, *, ending: bool) -> str:
        """`commit` for a rank that has lost its peers: an error becomes the line."""
        try:
            line = self.commit(ending=ending)
        except Exception as error:
            line = f"the last whole step could not be committed: {error}"
        return f"dlora: rank {self._context.ranks.rank}: {line}"

    def guard(self, work: Callable[[], int], peers: PeerWatch) -> int:
        """The exit status of `work`, which runs with other ranks; 1 where one of them was lost.

        Whatever torch raises, the last whole step is committed.
        """
        try:
            status = work()
            self._context.ranks.leave()
        except ReplicaError as error:  # on every rank; its adapters are wrong, so nothing is saved
            console.error(str(error))
            return 1
        except RuntimeError as error:
            line, reason = self.commit_alone(ending=True), str(error).strip().split("\n")[0]
            lost = isinstance(error, dist.DistError) or any(sign in str(error) for sign in _LOST)
            lost = lost and found_report(self._context.ranks) is None
            if not lost:
                print(line, file=sys.stderr, flush=True)
                raise
            reason = f"{peers.lost() or 'it is not known which'}; {reason}"
            print(f"{line} (lost a peer: {reason})", file=sys.stderr, flush=True)
            self._context.hooks.lost()
            return 1
        return status

    def publish(self, adapter: Path) -> None:
        """Copy the adapter, which was just written, to `output.remote`."""
        self._copy(adapter.name, lambda remote: remote.put(adapter))

    def write_method_files(self, step: int) -> None:
        """Write the files that the adapters' method has in the run's directory, up to a step."""
        self._context.replica.method.write_files(self._context.directory, until=step)

    def _beside(self) -> dict[str, Any]:
        """The content of a checkpoint beside the trained tensors."""
        replica = self._context.replica
        return {
            "states": replica.states(self._context.optimizer),
            "record": replica.method.record(),
            "frozen": replica.frozen,
        }

    def _nothing_to_commit(self) -> str:
        if self._context.replica.strategy.collective_saves:
            return "no rank has the whole optimizer state; the newest checkpoint is the last save"
        there = f"; step {self._start} is committed" if self._start else ""
        return f"no step has finished since the start{there}"

    def _state(self, step: int) -> dict[str, Any]:
        found = self._context.prepared
        fingerprints = found.train.fingerprint, found.base_identity
        state = state_at(step, self._context.config, found.lora, found.sampler, *fingerprints)
        return state | {"ranks": self._context.ranks.world}

    @contextlib.contextmanager
    def _warning_of_disk(self, step: int) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            console.warning(f"step {step} could not be saved: {error}; the run continues")

    def _write_behind(self, checkpoint: Checkpoint) -> Saved | None:
        with self._warning_of_disk(checkpoint.state["step"]):
            directory = self._write(checkpoint)
            return Saved(directory, self._push(directory))
        return None

    def _write(self, checkpoint: Checkpoint) -> Path:
        with self._writing:
            return checkpoints.write(
                checkpoint,
                self._root,
                resolved_yaml(self._context.config, self._context.prepared),
                self._context.config.output.keep_last,
                rank=self._context.ranks.rank,
                check=self._context.lock.check,
            )

    def _push(self, directory: Path) -> str | None:
        """Copy a checkpoint to `output.remote`; its URL there."""
        keep_last = self._context.config.output.keep_last
        return self._copy(directory.name, lambda remote: remote.push(directory, keep_last))

    def _copy(self, name: str, copy: Callable[[RemoteCheckpoints], object]) -> str | None:
        """Copy something to `output.remote`; its URL there.

        A store that refuses it does not end the run: that is a warning, and there is no URL.
        """
        if self._remote is None:
            return None
        self._context.lock.check()
        try:
            copy(self._remote)
        except Exception as error:  # every store has exceptions of its own
            console.warning(
                f"{name} could not be copied to {self._remote.url}: {error}; the run continues"
            )
            return None
        return f"{self._remote.url}/{name}"
