"""Copies what a run has committed to `output.remote`, in a thread that the run never waits for.

    save  ──written──>  push  ──>  push  ──>  publish         one after the other
    close, at the run's end, waits for all

Where a store is slower than saves come, a checkpoint that waits gives way to `output.keep_last`
newer ones.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from dlora.checkpoint.remote import RemoteCheckpoints, remote_of
from dlora.hooks import Committed, Saved
from dlora.runtime.console import console
from dlora.training.context import SavedRun


class Pushes:
    """The copies of one run."""

    def __init__(self, context: SavedRun) -> None:
        self._context = context
        self._remote = remote_of(context.config)
        self._thread = ThreadPoolExecutor(1, "dlora-push")
        self._keep_last = context.config.output.keep_last
        self._written: list[str] = []  # names of checkpoints, in order
        self._lock = threading.Lock()  # over the two below
        self._reading: Path | None = None  # what is being copied, and must stay where it is
        self._deleted: set[Path] = set()

    def after(self, writing: Future[Path | None]) -> Committed:
        """Copy a checkpoint once it is written.

        Args:
            writing: its directory; None where the write failed.

        Returns:
            A function that waits for the end of both.
        """
        writing.add_done_callback(self._note)
        if self._remote is None:
            return lambda: _saved(writing.result(), None)
        return self._thread.submit(self._push_written, writing).result

    def push(self, directory: Path) -> str | None:
        """Copy a checkpoint now; its URL there, or None."""
        return self._copy(directory.name, lambda remote: remote.push(directory, self._keep_last))

    def publish(self, adapter: Path) -> None:
        """Copy the adapter, which was just written, after what waits."""
        if self._remote is not None:
            self._thread.submit(self._copy, adapter.name, lambda remote: remote.put(adapter))

    def close(self) -> None:
        """Wait for everything; afterwards only `push` may be called."""
        self._thread.shutdown()

    def may_delete(self, directory: Path) -> bool:
        """Whether an older checkpoint may be deleted now; if so, it is not copied any more."""
        with self._lock:
            if directory == self._reading:
                return False
            self._deleted.add(directory)
            return True

    def _note(self, writing: Future[Path | None]) -> None:
        if not writing.exception() and (directory := writing.result()) is not None:
            self._written.append(directory.name)

    def _push_written(self, writing: Future[Path | None]) -> Saved | None:
        if (directory := writing.result()) is None:
            return None
        newer = sum(name > directory.name for name in self._written)
        with self._lock:
            gone = newer >= self._keep_last or directory in self._deleted
            self._reading = None if gone else directory
        if gone:
            console.info(
                f"{directory.name} is not copied to output.remote, which is slower than saves "
                "come: newer ones are next"
            )
            return _saved(directory, None)
        try:
            return _saved(directory, self.push(directory))
        finally:
            self._reading = None

    def _copy(self, name: str, copy: Callable[[RemoteCheckpoints], object]) -> str | None:
        """Copy something to `output.remote`; its URL there.

        A store that refuses it does not end the run: that is a warning, and there is no URL.
        """
        if self._remote is None:
            return None
        try:
            self._context.lock.check()
            copy(self._remote)
        except Exception as error:  # every store has exceptions of its own
            console.warning(
                f"{name} could not be copied to {self._remote.url}: {error}; the run continues"
            )
            return None
        return f"{self._remote.url}/{name}"


def _saved(directory: Path | None, url: str | None) -> Saved | None:
    return None if directory is None else Saved(directory, url)
