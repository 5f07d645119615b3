"""One run at a time in a directory: a lock of the kernel's, and a heartbeat for other hosts.

    <output.dir>/.lock    {"pid": …, "host": …, "kernel": …, "run": …, "token": …}, flocked while
                          the run lives; its time is renewed every few seconds

The kernel frees the lock of a process that dies, however it dies, though a large one takes seconds
to go. Between kernels two things may go wrong, and the file's time shows which: a file system whose
locks end at their host does not show the lock of a run that lives, and a server may keep the lock
of a host that died. The boot id tells kernels apart: a pod that starts again on another node has
the name of the one before.

A run whose heartbeat stopped, as under SIGSTOP, may find another run in the directory when it
continues. So every write asks `check` first, which reads the token once the heartbeat is old enough
for a takeover.

Whatever starts a run's ranks again may name the run in DLORA_RUN_ID (Ray's launcher does): an
earlier start of it may still live on a host that was cut off, and is waited for; another run there
is a mistake.

`filelock.SoftFileLease` (4.2) does not replace this: it breaks the lock of a living process on
another node with the same host name at once, refuses after a whole lease instead of at the first
heartbeat, and has no room for the run's name.
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
import uuid
from pathlib import Path

from dlora.errors import TransientError, UsageError
from dlora.runtime.console import console

NAME = ".lock"
BEAT_SECONDS = 5.0
STALE_SECONDS = 20.0  # without a beat, after which the run of another host counts as dead
LEASE_SECONDS = 120.0  # in which a server forgets the locks of a host that died; NFS 4 takes 90
FILE_BYTES = 1024  # of the padded text
Owner = dict[str, str]


class RunLock:
    """The lock of a directory, from `take` to `release` or the end of the process.

    Args:
        token: rank 0's, for another rank of the run, which only checks it (and only where it sees
            rank 0's file: its disk may be another one).
        beat_seconds, stale_seconds: between two heartbeats, and until a silent run counts as dead.
        lease_seconds: how long the lock of a dead run is waited for.
        key: what errors call the directory.
    """

    def __init__(
        self,
        directory: Path,
        token: str = "",
        *,
        beat_seconds: float = BEAT_SECONDS,
        stale_seconds: float = STALE_SECONDS,
        lease_seconds: float = LEASE_SECONDS,
        key: str = "output.dir",
    ) -> None:
        self.token = token or uuid.uuid4().hex
        self._path, self._key = directory / NAME, key
        self._is_seen = not token or f'"{token}"' in self._text()
        self._beat_seconds, self._stale_seconds = beat_seconds, stale_seconds
        self._lease_seconds = lease_seconds
        self._checked = _now()  # when the directory was ours for certain
        self._over = threading.Event()
        self._descriptor = -1

    def take(self) -> None:
        """Take the lock; makes the directory if need be, and logs what it waits for.

        Raises:
            UsageError: another run has it, or the directory cannot be written to.
            TransientError: it cannot be had yet: its owner is silent, or an earlier start of this
                run.
        """
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise UsageError(f"{self._key}: cannot write {self._path}: {error.strerror}") from error
        try:
            self._wait_until_free()
            me = {"pid": os.getpid(), "host": _host(), "kernel": _kernel(), "run": _run()}
            # In one write over the old text: an empty file would count as free.
            text = json.dumps({**me, "token": self.token}).ljust(FILE_BYTES)
            os.pwrite(self._descriptor, text.encode(), 0)
            os.ftruncate(self._descriptor, len(text))
        except OSError as error:  # such as a full disk
            self._close()
            raise UsageError(f"{self._key}: cannot write {self._path}: {error.strerror}") from error
        except BaseException:
            self._close()
            raise
        self._checked = _now()
        threading.Thread(target=self._beat, name="dlora-lock", daemon=True).start()

    def release(self) -> None:
        """Release the lock."""
        self._over.set()
        if self._descriptor >= 0:
            # A directory that is gone must not change how the run ends.
            with contextlib.suppress(OSError):
                if self._is_ours():
                    os.ftruncate(self._descriptor, 0)
            with contextlib.suppress(OSError):
                self._close()

    def check(self) -> None:
        """Check that no other run has taken the directory over; call it before every write there.

        Raises:
            TransientError: one has, while this process was suspended.
        """
        now = _now()
        if now - self._checked < self._stale_seconds:
            return
        if not self._is_ours():
            by = f"{_who(owner)} has" if (owner := self._owner()) else "another run has"
            raise TransientError(
                f"{self._key}: {by} taken over {self._path.parent} while this run was suspended; "
                "this run writes nothing more"
            )
        self._checked = now

    def _is_ours(self) -> bool:
        """Whether no other run has written or emptied the file; a deleted one counts as ours."""
        is_there = self._is_seen and self._path.exists()
        return not is_there or f'"{self.token}"' in self._text()

    def _text(self) -> str:
        try:
            return self._path.read_text(encoding="utf-8")
        except (OSError, ValueError):
            return ""

    def _wait_until_free(self) -> None:
        """Return once the lock is ours and the run that was here last is dead."""
        began = last_sign = _now()
        beat = 0
        while True:
            free, knows = self._flock()
            owner, last, beat = self._owner(), beat, self._last_beat()
            if free and (owner is None or (knows and _is_here(owner))):
                return  # the kernel would have shown the lock of a run that lives
            if not last:
                runs = "was running" if free else "runs"
                console.info(
                    f"{self._key}: {_who(owner)} {runs} here; waiting for its next heartbeat"
                )
            elif beat != last:
                if owner is None or not owner["run"] == _run() != "":
                    raise UsageError(
                        f"{self._key}: {_who(owner)} is running in {self._path.parent}; wait for "
                        "it, stop it, or name another directory"
                    )
                last_sign = _now()
            if free and _now() - last_sign >= self._stale_seconds:
                console.info(f"{self._key}: {_who(owner)} has no heartbeat; taking over its lock")
                return
            if _now() - began > self._stale_seconds + self._lease_seconds:
                raise TransientError(
                    f"{self._key}: {_who(owner)} has no heartbeat any more, but its file system "
                    f"keeps its lock on {self._path}; remove that file if the run is dead"
                    if last_sign == began
                    else (f"{self._key}: {_who(owner)}, an earlier start of this run, still runs")
                )
            time.sleep(self._beat_seconds / 10)

    def _flock(self) -> tuple[bool, bool]:
        """Whether no process of this kernel has the lock, and whether the file system knows it."""
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            has_locks = error.errno in (errno.EAGAIN, errno.EACCES)
            return not has_locks, has_locks
        return True, True

    def _close(self) -> None:
        os.close(self._descriptor)
        self._descriptor = -1

    def _owner(self) -> Owner | None:
        """Who has or had the lock; None if the file does not say."""
        try:
            found = json.loads(self._text())
            return {key: str(found.get(key, "")) for key in ("pid", "host", "kernel", "run")}
        except (ValueError, AttributeError):
            return None

    def _last_beat(self) -> int:
        """Its time in ns, as the server has it: opening a file asks there, a mere stat may not."""
        try:
            with self._path.open("rb") as file:
                return os.fstat(file.fileno()).st_mtime_ns
        except OSError as error:
            raise TransientError(f"{self._key}: {self._path}: {error.strerror}") from error

    def _beat(self) -> None:
        while not self._over.wait(self._beat_seconds):
            now = _now()
            if not self._is_ours():
                return  # the next `check` raises
            with contextlib.suppress(OSError):  # the directory is gone for now; the run continues
                os.utime(self._descriptor)
                self._checked = now


def _now() -> float:
    """Seconds, on Linux also those in which the machine was suspended."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


def _who(owner: Owner | None) -> str:
    return "another process" if owner is None else f"process {owner['pid']} on {owner['host']}"


def _is_here(owner: Owner) -> bool:
    return (owner["kernel"], owner["host"]) == (_kernel(), _host())


def _kernel() -> str:
    """The boot id: differs between kernels, and between two starts of one."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


def _host() -> str:
    return socket.gethostname()


def _run() -> str:
    return os.environ.get("DLORA_RUN_ID", "")
