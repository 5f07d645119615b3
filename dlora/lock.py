"""One run at a time in a directory: a lock of the kernel's, and a heartbeat for other hosts.

    <output.dir>/.lock    {"pid": …, "host": …}, flocked as long as the run lives; its time is
                          renewed every few seconds

The kernel frees the lock of a process that dies, however it dies. On a network file system a lock
may end at its host: there the time of the file tells whether the other run is alive.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

from dlora.errors import UsageError
from dlora.runtime import Runtime

NAME = ".lock"
BEAT_SECONDS = 5.0
STALE_SECONDS = 20.0  # without a beat, after which the run of another host counts as dead
_HELD = (errno.EAGAIN, errno.EACCES)


class RunLock:
    """The lock of a directory, from `take` to `release` or the end of the process.

    Args:
        beat_seconds, stale_seconds: between two heartbeats, and until a silent one is dead.
    """

    def __init__(
        self,
        directory: Path,
        *,
        beat_seconds: float = BEAT_SECONDS,
        stale_seconds: float = STALE_SECONDS,
    ) -> None:
        self._path = directory / NAME
        self._beat_seconds, self._stale_seconds = beat_seconds, stale_seconds
        self._over = threading.Event()
        self._descriptor = -1

    def take(self, say: Callable[[str], None]) -> None:
        """Take the lock; makes the directory if need be.

        Args:
            say: gets a line where another host's lock is waited for or taken over.

        Raises:
            UsageError: another run has it, or the directory cannot be written to.
        """
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise UsageError(f"output.dir: cannot write {self._path}: {error.strerror}") from error
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _HELD:
                raise self._taken() from None
            # A file system without locks: the heartbeat alone has to do.
        self._outlive(say)
        me = json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode()
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, me, 0)
        threading.Thread(target=self._beat, name="dlora-lock", daemon=True).start()

    def release(self) -> None:
        """Let another run have it."""
        self._over.set()
        if self._descriptor >= 0:
            os.ftruncate(self._descriptor, 0)
            os.close(self._descriptor)
            self._descriptor = -1

    def _outlive(self, say: Callable[[str], None]) -> None:
        """Where a run of another host was here last: see that it is dead."""
        pid, host = self._owner()
        if host in ("", socket.gethostname()):
            return  # a lock of this host's would have been held
        say(f"output.dir: process {pid} on {host} was running here; waiting for a sign of life")
        seen, until = self._path.stat().st_mtime_ns, time.monotonic() + self._stale_seconds
        while time.monotonic() < until:
            time.sleep(self._beat_seconds / 10)
            if self._path.stat().st_mtime_ns != seen:
                raise self._taken()
        say(f"output.dir: no sign of life of {host}: its lock is taken over")

    def _taken(self) -> UsageError:
        pid, host = self._owner()
        os.close(self._descriptor)
        self._descriptor = -1
        return UsageError(
            f"output.dir: process {pid} on {host} is running in {self._path.parent}; wait for it, "
            "stop it, or name another directory"
        )

    def _owner(self) -> tuple[str, str]:
        """(process, host), empty where nobody has left a name."""
        try:
            found = json.loads(os.pread(self._descriptor, 4096, 0))
            return str(found["pid"]), str(found["host"])
        except (ValueError, KeyError, TypeError):
            return "", ""

    def _beat(self) -> None:
        while not self._over.wait(self._beat_seconds):
            try:
                os.utime(self._descriptor)
            except OSError:  # the directory is gone for now; the run goes on
                continue


def locked(directory: Path, runtime: Runtime) -> RunLock:
    """The lock of a run's directory, which rank 0 takes for all ranks.

    Raises:
        UsageError: on every rank, if another run has it.
    """
    lock = RunLock(directory)

    def take() -> tuple[None, str]:
        if runtime.main:
            lock.take(runtime.say)
        return None, ""

    runtime.agree("lock", take)
    return lock
