"""One run at a time in a directory: a lock of the kernel's, and a heartbeat for other hosts.

    <output.dir>/.lock    {"pid": …, "host": …, "kernel": …, "run": …}, flocked as long as the run
                          lives; its time is renewed every few seconds

The kernel frees the lock of a process that dies, however it dies, though a large one takes seconds
to go. Between kernels two things may go wrong, and the time of the file tells what is the case: a
file system whose locks end at their host shows none of a run that lives, and one whose server holds
them may keep that of a host that died. A kernel is told from others by its boot as well as by the
host's name: a pod that starts again on another node has the name of the one before.

What starts a run's ranks again by itself may name the run in DLORA_RUN_ID (Ray's launcher does): an
earlier start of it may still live on a host that was cut off, and is waited for, where a run of
somebody else is a mistake.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

from dlora.errors import TransientError, UsageError
from dlora.runtime.ranks import Runtime

NAME = ".lock"
BEAT_SECONDS = 5.0
STALE_SECONDS = 20.0  # without a beat, after which the run of another host counts as dead
LEASE_SECONDS = 120.0  # in which a server forgets the locks of a host that died; NFS 4 takes 90
_HELD = (errno.EAGAIN, errno.EACCES)


class RunLock:
    """The lock of a directory, from `take` to `release` or the end of the process.

    Args:
        beat_seconds, stale_seconds: between two heartbeats, and until a silent one is dead.
        lease_seconds: how long the lock of a dead one is waited for.
    """

    def __init__(
        self,
        directory: Path,
        *,
        beat_seconds: float = BEAT_SECONDS,
        stale_seconds: float = STALE_SECONDS,
        lease_seconds: float = LEASE_SECONDS,
    ) -> None:
        self._path = directory / NAME
        self._beat_seconds, self._stale_seconds = beat_seconds, stale_seconds
        self._lease_seconds = lease_seconds
        self._over = threading.Event()
        self._descriptor = -1
        self._tells = True  # whether the file system tells who holds a lock

    def take(self, say: Callable[[str], None]) -> None:
        """Take the lock; makes the directory if need be.

        Args:
            say: gets a line where a lock is waited for or taken over.

        Raises:
            UsageError: another run has it, or the directory cannot be written to.
            TransientError: nobody seems to have it, or an earlier start of this run, and it cannot
                be had yet.
        """
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise UsageError(f"output.dir: cannot write {self._path}: {error.strerror}") from error
        self._outlive(self._flock(), say)
        me = {"pid": os.getpid(), "host": _host(), "kernel": _kernel(), "run": _run()}
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, json.dumps(me).encode(), 0)
        threading.Thread(target=self._beat, name="dlora-lock", daemon=True).start()

    def release(self) -> None:
        """Let another run have it."""
        self._over.set()
        if self._descriptor >= 0:
            # Where the directory is gone, that is not how the run ends.
            with contextlib.suppress(OSError):
                os.ftruncate(self._descriptor, 0)
            with contextlib.suppress(OSError):
                self._close()

    def _flock(self) -> bool:
        """Whether nobody else has it; a file system without locks knows of nobody, and `_tells`."""
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._tells = error.errno in _HELD
            return not self._tells
        return True

    def _outlive(self, free: bool, say: Callable[[str], None]) -> None:
        """Where a run was here last: see that it is dead, and that its lock is ours."""
        owner = self._owner()
        is_ours = owner is None or (owner["kernel"], owner["host"]) == (_kernel(), _host())
        is_ours = is_ours and self._tells
        if free and (is_ours or owner is None):
            return  # the lock of a run that lives would have been held
        runs = "was running" if free else "runs"
        say(f"output.dir: {_who(owner)} {runs} here; waiting for a sign of life")
        seen, began = self._last_beat(), time.monotonic()
        heard = began
        while not free or time.monotonic() - heard < self._stale_seconds:
            if time.monotonic() - began > self._stale_seconds + self._lease_seconds:
                self._close()
                raise TransientError(
                    f"output.dir: {_who(owner)} gives no sign of life, but its file system keeps "
                    f"its lock of {self._path}; remove that file if the run is dead"
                    if heard == began
                    else f"output.dir: {_who(owner)}, an earlier start of this run, still runs"
                )
            time.sleep(self._beat_seconds / 10)
            free = free or self._flock()
            if free and (is_ours or self._owner() is None):
                return  # it has let go
            if (beat := self._last_beat()) != seen:
                owner = self._owner()  # who beats may be another that has waited, too
                if owner is None or not owner["run"] == _run() != "":
                    self._close()
                    raise UsageError(
                        f"output.dir: {_who(owner)} is running in {self._path.parent}; wait for "
                        "it, stop it, or name another directory"
                    )
                seen, heard = beat, time.monotonic()
        say(f"output.dir: no sign of life of {_who(owner)}: its lock is taken over")

    def _close(self) -> None:
        os.close(self._descriptor)
        self._descriptor = -1

    def _owner(self) -> dict[str, str] | None:
        """Who has or had the lock; None where nobody has left a name."""
        try:
            found = json.loads(os.pread(self._descriptor, 4096, 0))
            return {key: str(found.get(key, "")) for key in ("pid", "host", "kernel", "run")}
        except (ValueError, AttributeError):
            return None

    def _last_beat(self) -> int:
        """Its time in ns, as the server has it: opening a file asks there, a mere stat may not."""
        try:
            with self._path.open("rb") as file:
                return os.fstat(file.fileno()).st_mtime_ns
        except OSError as error:
            self._close()
            raise TransientError(f"output.dir: {self._path}: {error.strerror}") from error

    def _beat(self) -> None:
        while not self._over.wait(self._beat_seconds):
            try:
                os.utime(self._descriptor)
            except OSError:  # the directory is gone for now; the run goes on
                continue


def _who(owner: dict[str, str] | None) -> str:
    return "another process" if owner is None else f"process {owner['pid']} on {owner['host']}"


def _kernel() -> str:
    """What tells this kernel from others, and from itself before it was last started."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


def _host() -> str:
    return socket.gethostname()


def _run() -> str:
    return os.environ.get("DLORA_RUN_ID", "")


def locked(directory: Path, runtime: Runtime) -> RunLock:
    """The lock of a run's directory, which rank 0 takes for all ranks.

    Raises:
        UsageError, TransientError: as `RunLock.take`, on every rank.
    """
    lock = RunLock(directory)

    def take() -> tuple[None, str]:
        if runtime.main:
            lock.take(runtime.say)
        return None, ""

    runtime.agree("lock", take, patience_seconds=STALE_SECONDS + LEASE_SECONDS)
    return lock
