"""SIGTERM and SIGINT, a file or a callable: finish the step, commit, and exit with 143 or 130.

    signal ──Python's handler, between two bytecodes of the main thread──> flags of the next step
       └────C's handler, at once──> a socket ──> watcher thread: still running after 5 s?

A main thread that is blocked in a collective runs no handler. So a thread watches for a stop that
is not carried out: it commits the last whole step, and ends the process if a peer hangs.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

from dlora.hooks import never
from dlora.runtime.peer_watch import Commit

GRACE_SECONDS = (
    5.0  # signals this close together are one: launchers forward what the shell sent too
)
POLL_SECONDS = 0.2  # between two looks at a stop that is not carried out
STOPPING = (signal.SIGTERM, signal.SIGINT)
STOP_FLAGS = ("terminated", "interrupted")  # what `StopRequest.poll` returns


class StopRequest:
    """Remembers a stop signal until the loop looks; a second one, later, ends the process.

    Signals reach the main thread alone: made in another one, it knows the file and the callable.

    Args:
        file: a path whose appearance is a stop as well; for the rank that looks at it.
        asked: called after every step; true is a stop as well.

    Attributes:
        cause: what this rank was stopped by, as a user calls it; empty where it was not.
    """

    def __init__(self, file: Path | None = None, asked: Callable[[], bool] = never) -> None:
        self.signal, self.cause = 0, ""
        self._file, self._asked = file, asked
        self._first = 0.0  # when the first signal came
        self._last_beat = 0.0  # 0: none yet
        self._gaps: deque[float] = deque([0.0], maxlen=32)  # seconds between two beats
        self._commit: Commit | None = None
        self._thread = threading.Thread(target=self._watch, name="dlora-stop", daemon=True)
        if threading.current_thread() is threading.main_thread():
            self._ours, self._theirs = socket.socketpair()
            self._theirs.setblocking(False)
            for number in STOPPING:
                signal.signal(number, self._handle)
            wakes = self._theirs.fileno()
            self._before = signal.set_wakeup_fd(wakes, warn_on_full_buffer=False)
            self._thread.start()

    def beat(self) -> None:
        """Record progress; every pass of the model calls it."""
        now = time.monotonic()
        if self._last_beat:
            self._gaps.append(now - self._last_beat)
        self._last_beat = now

    @contextlib.contextmanager
    def committing(self, commit: Commit) -> Iterator[None]:
        """Inside, a stop that the loop does not carry out in time calls `commit`.

        Args:
            commit: saves the last whole step without other ranks, and returns a line about it; its
                argument is whether the process is about to end.
        """
        self._commit = commit
        try:
            yield
        finally:
            self.close()

    def close(self) -> None:
        """End the watch; later signals are only recorded."""
        if self._thread.is_alive():
            signal.set_wakeup_fd(self._before)
            self._theirs.close()
            self._thread.join()
            self._ours.close()
            self._commit = None

    def poll(self) -> list[float]:
        """[whether to stop as for SIGTERM, as for SIGINT], to be summed over ranks."""
        if not self.cause:
            if self.signal:
                self.cause = "a signal"
            elif self._file is not None and self._file.exists():
                self.cause = "output.stop_file"
            elif self._asked():
                self.cause = "should_stop"
        interrupted = self.signal == signal.SIGINT
        return [float(bool(self.cause) and not interrupted), float(interrupted)]

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.signal = self.signal or number
        if not self._thread.is_alive():
            self._count(number)

    def _count(self, number: int) -> None:
        """One signal came; a second one ends the process."""
        now = time.monotonic()
        if self._first and now - self._first > GRACE_SECONDS:
            os._exit(128 + number)
        if not self._first:
            self._first, self.signal = now, self.signal or number

    def _watch(self) -> None:
        committed = False
        while True:
            ready, _, _ = select.select([self._ours], [], [], POLL_SECONDS if self._first else None)
            if ready:
                received = self._ours.recv(64)
                if not received:
                    return
                for number in received:
                    if number in STOPPING:
                        self._count(number)
            commit = self._commit
            if commit and self._first and time.monotonic() - self._first > GRACE_SECONDS:
                hangs = self._hangs()
                if hangs or not committed:
                    line, committed = commit(ending=hangs), True
                if hangs:
                    print(line, file=sys.stderr, flush=True)
                    os._exit(128 + self.signal)

    def _hangs(self) -> bool:
        """Whether there was no sign of progress for longer than slow passes account for."""
        silence = time.monotonic() - self._last_beat
        return self._last_beat > 0 and silence > max(GRACE_SECONDS, 2 * max(self._gaps))


def exit_status(flags: list[float]) -> int | None:
    """143 where any rank saw SIGTERM, 130 where any saw SIGINT, None where none saw a signal."""
    terminated, interrupted = flags
    if terminated:
        return 128 + signal.SIGTERM
    return 128 + signal.SIGINT if interrupted else None
