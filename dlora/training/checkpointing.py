"""What a rank saves of a run: at the steps that are due, and when peers are lost.

save      the step that was just made, copied at once and written by a thread; rank 0 alone,
          unless the optimizer state is divided over ranks
snapshot  every `output.snapshot_every` steps: a copy in host memory, on two ranks of each node
commit    the snapshot becomes a checkpoint: no collective, from any thread
push      a copy of what is committed, in `output.remote`: the run does not wait for it
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch.distributed as dist

from dlora.checkpoint import format as checkpoints
from dlora.checkpoint import writing
from dlora.checkpoint.format import Checkpoint
from dlora.checkpoint.host_copy import capture
from dlora.checkpoint.listing import set_aside_after
from dlora.checkpoint.snapshot import KEEPERS, Snapshots
from dlora.errors import UsageError
from dlora.hooks import Committed, nothing
from dlora.runtime.console import console
from dlora.runtime.failure import found_report, note, noted
from dlora.runtime.peer_watch import PeerWatch
from dlora.sharding.replica.optimizer_state import ReplicaError
from dlora.training.context import CHECKPOINTS, SavedRun
from dlora.training.pushes import Pushes

# Texts of gloo's and torch's errors when the connection to a peer is lost.
_LOST = ("gloo", "Connection closed by peer", "Connection reset by peer", "Broken pipe")
KEEPER_SECONDS = 20.0  # that the others wait for one of them: an agent ends all after the first
_COMMITTED = "committed"  # of the store: what the first that has committed says
RESUMES = "the same command resumes from there"


class CheckpointManager:
    """Saves one run.

    Args:
        start: the step that it resumes after.

    Attributes:
        pinned: a step whose checkpoint is never deleted.
    """

    pinned: int | None = None

    def __init__(self, context: SavedRun, start: int) -> None:
        self._context, self._start = context, start
        self._root = context.directory / CHECKPOINTS
        self._snapshots = Snapshots()
        self._done = start  # the last whole step
        self._back_at: int | None = None  # the step that the run was rolled back to
        self._committing = threading.Lock()  # one commit at a time
        self._writing = threading.Lock()  # one checkpoint at a time
        self._writer = ThreadPoolExecutor(1, "dlora-save")
        self._pending: Future[Path | None] | None = None
        self._pushes = Pushes(context)

    def save(self, step: int, record: dict[str, Any]) -> None:
        """Commit a checkpoint: rank 0 alone, unless the optimizer state is divided over ranks.

        If the write fails, a warning is logged and the run continues; the next save tries again.
        After a `roll_back` nothing is saved.

        Args:
            record: the step's line of the metrics.
        """
        if self._back_at is not None:
            return
        replica = self._context.replica
        committed: Committed = nothing
        if self._context.ranks.main or replica.strategy.collective_saves:
            self.settle()  # before there is a second copy beside the one that is being written
            captured = capture(replica, state=self._context.state(step), **self._context.beside())
            if captured is not None:
                with self._warning_of_disk(step):
                    self.write_method_files(step)
                self._pending = self._writer.submit(self._write_behind, captured)
                committed = self._pushes.after(self._pending)
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

    @property
    def keeps_snapshots(self) -> bool:
        """Whether this rank is one of its node's that do.

        None does where the optimizer state is divided: no rank has all of it.
        """
        topology = self._context.topology
        on_node = topology.rank - topology.node * topology.ranks_per_node
        return on_node < KEEPERS and not self._context.replica.strategy.collective_saves

    def snapshot(self, step: int, metrics: dict[str, Any]) -> None:
        """Copy a step that is due to host memory, with its line of the metrics."""
        self._done = step
        if step % self._context.config.output.snapshot_every == 0 and self.keeps_snapshots:
            beside = self._context.beside() | {"state": self._context.state(step)}
            self._snapshots.take(step, metrics, self._context.replica, **beside)

    def before_change(self) -> None:
        """Comes before anything that changes what a snapshot copies."""
        self._snapshots.before_change()

    def look(self) -> None:
        """Note whether the newest snapshot has arrived; every pass of the model does it."""
        self._snapshots.look()

    def roll_back(self, step: int, decided: Mapping[str, Any]) -> Checkpoint | None:
        """Make the checkpoint of an earlier step the newest; later ones are renamed.

        Every rank calls it; rank 0 writes, and returns the checkpoint.

        Args:
            decided: is written into its `state.json`.

        Raises:
            UsageError: it is damaged, or not there.
        """
        self.settle()
        self._back_at = step
        if not self._context.ranks.main:
            return None
        checkpoint = checkpoints.read(self._root / f"step-{step:06d}")
        checkpoint.state |= decided
        self._write(checkpoint)
        set_aside_after(step, self._root)
        return checkpoint

    def commit(self, *, ending: bool) -> str:
        """Commit the snapshot, unless its step is committed already; returns a line about it.

        Args:
            ending: the process will write nothing more, so the step's metrics are written as well.
        """
        if self._back_at is not None:
            return f"the run is rolled back to step {self._back_at}"
        with self._committing, self._snapshots.newest() as snapshot:
            if snapshot is None:
                return self._nothing_to_commit()
            step = snapshot.step
            directory = self._root / f"step-{step:06d}"
            try:
                checkpoints.verify(directory)
            except UsageError:
                self._context.lock.check()
                self.write_method_files(step)
                self._pushes.push(self._write(snapshot.checkpoint()))
            every = self._context.config.output.log_every
            if ending and every and step % every == 0:
                self._context.lock.check()
                self._context.complete_metrics(snapshot.metrics)
        older = self._done - step
        behind = f", {older} step{'s'[: older - 1]} before the last whole one" if older else ""
        line = f"step {step} is committed in {directory}{behind}; {RESUMES}"
        if ending:
            note(self._context.ranks, _COMMITTED, line)
        return line

    def commit_alone(self, *, ending: bool) -> str:
        """`commit` for a rank that has lost its peers: an error becomes the line."""
        try:
            line = self.commit(ending=ending) if self.keeps_snapshots else self._keeper_s_line()
        except Exception as error:
            line = f"the last whole step could not be committed: {error}"
        return f"dlora: rank {self._context.ranks.rank}: {line}"

    def guard(self, work: Callable[[], int], peers: PeerWatch) -> int:
        """The exit status of `work`, which runs with other ranks; 1 where one of them was lost.

        Whatever torch raises, the last whole step is committed.
        """
        try:
            status = work()
            with peers.waiting():  # for a store, as long as it takes
                self.close()
                self._context.ranks.leave()
            return status
        except ReplicaError as error:  # on every rank; its adapters are wrong, so nothing is saved
            console.error(str(error))
        except RuntimeError as error:
            lost = isinstance(error, dist.DistError) or any(sign in str(error) for sign in _LOST)
            lost = lost and found_report(self._context.ranks) is None
            if not lost:  # the others learn of it when it is raised, so nothing is waited for
                if self.keeps_snapshots:
                    print(self.commit_alone(ending=True), file=sys.stderr, flush=True)
                raise
            line, reason = self.commit_alone(ending=True), str(error).strip().split("\n")[0]
            reason = f"{peers.lost() or 'it is not known which'}; {reason}"
            print(f"{line} (lost a peer: {reason})", file=sys.stderr, flush=True)
            self._context.hooks.lost()
        with peers.waiting():
            self.close()
        return 1

    def close(self) -> None:
        """Wait for what is being copied to `output.remote`; nothing is saved afterwards."""
        self._pushes.close()

    def publish(self, adapter: Path) -> None:
        """Copy the adapter, which was just written, to `output.remote`."""
        self._pushes.publish(adapter)

    def write_method_files(self, step: int) -> None:
        """Write the files that the adapters' method has in the run's directory, up to a step."""
        self._context.write_method_files(step)

    def _nothing_to_commit(self) -> str:
        if self._done > self._start:
            return f"no snapshot is whole yet; the newest checkpoint is the last save ({RESUMES})"
        there = f"; step {self._start} is committed" if self._start else ""
        return f"no step has finished since the start{there}"

    def _keeper_s_line(self) -> str:
        """For a rank without snapshots, once one that has them has committed, or some seconds on.

        Until then it stays: where one process ends, agents and schedulers end the others.
        """
        if self._context.replica.strategy.collective_saves:
            return "no rank has the whole optimizer state; the newest checkpoint is the last save"
        said = noted(self._context.ranks, _COMMITTED, KEEPER_SECONDS)
        return said or f"snapshots are kept by the first {KEEPERS} ranks of each node"

    @contextlib.contextmanager
    def _warning_of_disk(self, step: int) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            console.warning(f"step {step} could not be saved: {error}; the run continues")

    def _write_behind(self, checkpoint: Checkpoint) -> Path | None:
        with self._warning_of_disk(checkpoint.state["step"]):
            return self._write(checkpoint)
        return None

    def _write(self, checkpoint: Checkpoint) -> Path:
        with self._writing:
            return writing.write(
                checkpoint,
                self._root,
                self._context.settings(),
                self._context.config.output.keep_last,
                rank=self._context.ranks.rank,
                check=self._context.lock.check,
                may_delete=self._may_delete,
            )

    def _may_delete(self, directory: Path) -> bool:
        is_pinned = self.pinned is not None and directory.name == f"step-{self.pinned:06d}"
        return not is_pinned and self._pushes.may_delete(directory)
