"""Checkpoints at an fsspec URL (`s3://…`, `gs://…`, `memory://…`), beside those on the disk.

    push     every file, the manifest last: a directory with a manifest is complete
    fetch    the newest that verifies, into the run's own directory

Stores have no rename and no lock, so the manifest is deleted first when a checkpoint is replaced or
deleted there. In a mounted directory a copy is written beside, and renamed. `latest` contains the
name of the newest, for people and scripts; dlora does not read it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path

import fsspec
from fsspec.implementations.local import LocalFileSystem

from dlora.checkpoint.format import LATEST, STEP_DIRECTORY, verify
from dlora.config.load import Config
from dlora.errors import TransientError, UsageError

MANIFEST = "manifest.json"
# These have no directories: to make one would make a bucket, of a mistyped name perhaps.
BUCKETS = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "oss", "r2"}
# Errors that a second attempt does not mend; all others may be the network.
MISTAKES = (FileNotFoundError, PermissionError, NotADirectoryError, ValueError, TypeError)
KEYS_MISSING = {"NoCredentialsError", "PartialCredentialsError"}  # botocore's, which may be absent
BESIDE = ".tmp"  # the end of the names of what is being copied


class RemoteCheckpoints:
    """The remote checkpoints of one run.

    Raises:
        UsageError: the URL's protocol is unknown, or what speaks it is not installed.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        try:
            self._files, self._root = fsspec.core.url_to_fs(self.url)
        except (ImportError, ValueError) as error:
            raise UsageError(f"output.remote: {url}: {error}") from None
        protocol = self._files.protocol
        protocols = {protocol} if isinstance(protocol, str) else set(protocol)
        self._has_directories = not protocols & BUCKETS
        # Others have no rename, or copy file by file for one, or know it by other arguments.
        self._renames = isinstance(self._files, LocalFileSystem)

    def push(self, directory: Path, keep_last: int) -> None:
        """Copy a checkpoint there; then delete all but the newest `keep_last` and this one."""
        target = self.put(directory)
        self._files.pipe_file(f"{self._root}/{LATEST}", f"{directory.name}\n".encode())
        for _, old in self.steps()[:-keep_last]:
            if old != target:
                self._remove(old)

    def put(self, directory: Path) -> str:
        """Copy a directory's files there, the manifest last.

        Survivors of a lost rank all copy the same step, and may be killed meanwhile: the first
        complete copy stays.

        Returns:
            Its path there.

        Raises:
            OSError: a file has another size there. Stores raise exceptions of their own, too.
        """
        target = f"{self._root}/{directory.name}"
        if self._has(directory, target):
            return target
        if self._renames:
            self._put_beside(directory, target)
        else:
            with contextlib.suppress(FileNotFoundError):
                self._files.rm_file(f"{target}/{MANIFEST}")
            self._copy(directory, target)
        return target

    def _put_beside(self, directory: Path, target: str) -> None:
        """Copy under a temporary name and rename; delete the copy after a failure."""
        place = f"{self._root}/.{uuid.uuid4().hex}{BESIDE}"
        try:
            self._copy(directory, place)
            self._name(directory, place, target)
        except Exception:
            with contextlib.suppress(OSError):
                self._remove(place)
            raise

    def _copy(self, directory: Path, to: str) -> None:
        self._make_directory(to)
        for name in sorted(_names_in(directory), key=_manifest_last):
            if "/" in name:  # of an expert
                self._make_directory(f"{to}/{name.rpartition('/')[0]}")
            self._files.put_file(str(directory / name), f"{to}/{name}")
            self._see_arrived(directory / name, f"{to}/{name}")

    def _name(self, directory: Path, place: str, target: str) -> None:
        """Rename a complete copy; an older one of that name is deleted afterwards."""
        aside = f"{place}.old{BESIDE}"
        if self._files.exists(target):
            if self._has(directory, target):
                self._remove(place)
                return
            with contextlib.suppress(FileNotFoundError):  # another survivor's turn
                os.rename(target, aside)
        try:
            os.rename(place, target)
        except OSError:
            if not self._has(directory, target):
                with contextlib.suppress(OSError):
                    os.rename(aside, target)
                raise
            self._remove(place)
        self._remove(aside)

    def _has(self, directory: Path, target: str) -> bool:
        """Whether the same checkpoint is complete there."""
        try:
            manifest = self._files.cat_file(f"{target}/{MANIFEST}")
            if manifest != (directory / MANIFEST).read_bytes():
                return False
            for name in _names_in(directory):
                self._see_arrived(directory / name, f"{target}/{name}")
        except OSError:
            return False
        return True

    def fetch(self, root: Path, after: int, warn: Callable[[str], None]) -> None:
        """Download the newest checkpoint past the step `after` that verifies, if there is one.

        Args:
            root: the directory of the run's checkpoints.
            warn: called with a line for each one that is skipped.

        Raises:
            UsageError: the store cannot be read, and a second attempt would not help.
            TransientError: it cannot be read now.
        """
        try:
            found = [path for step, path in self.steps() if step > after]
            for path in reversed(found):
                if self._download(path, root, warn):
                    return
        except Exception as error:  # every store has exceptions of its own
            raise self._trouble("read", error) from error

    def set_aside(self, after: int) -> None:
        """Move the checkpoints past a step aside: they belong to an abandoned course of the run.

        Delete what killed ranks have copied in part. The caller has the run's lock.

        Raises:
            UsageError: the store cannot be written, and a second attempt would not help.
            TransientError: it cannot be written now.
        """
        try:
            self._clear()
            newer = [path for step, path in self.steps() if step > after]
            number = 1
            while newer and self._files.exists(f"{self._root}/old-{number}"):
                number += 1
            for path in newer:
                self._move(path, f"{self._root}/old-{number}/{_last(path)}")
            if newer:
                with contextlib.suppress(FileNotFoundError):
                    self._files.rm_file(f"{self._root}/{LATEST}")
        except Exception as error:  # every store has exceptions of its own
            raise self._trouble("written", error) from error

    def _trouble(self, done: str, error: Exception) -> Exception:
        """The exception for a failure: a `UsageError` for a wrong name or key, else transient."""
        line = f"output.remote: {self.url} cannot be {done}: {error}"
        is_mistake = isinstance(error, MISTAKES) or type(error).__name__ in KEYS_MISSING
        return UsageError(line) if is_mistake else TransientError(" ".join(line.split()))

    def steps(self) -> list[tuple[int, str]]:
        """(step, path) of the complete ones, in order."""
        if not self._files.exists(self._root):
            return []
        self._files.invalidate_cache()
        listed = [str(path) for path in self._files.ls(self._root, detail=False)]
        named = [(STEP_DIRECTORY.fullmatch(_last(path)), path) for path in listed]
        complete = [
            (int(match[1]), path)
            for match, path in named
            if match and self._files.exists(f"{path}/{MANIFEST}")
        ]
        return sorted(complete)

    def _download(self, path: str, root: Path, warn: Callable[[str], None]) -> bool:
        """Download a checkpoint and verify it; whether it is on the disk now."""
        root.mkdir(parents=True, exist_ok=True)
        beside = root / f".{_last(path)}.{os.getpid()}.tmp"
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir()
        try:
            for entry in self._files.ls(path, detail=False):
                self._files.get_file(str(entry), str(beside / _last(str(entry))))
            verify(beside)
            shutil.rmtree(root / _last(path), ignore_errors=True)  # it did not verify, if there
            os.rename(beside, root / _last(path))
            return True
        except (UsageError, FileNotFoundError) as error:  # or pruned by one that still runs
            warn(f"skipping a checkpoint of {self.url}: {error}")
            return False
        finally:
            shutil.rmtree(beside, ignore_errors=True)

    def _clear(self) -> None:
        if self._renames and self._files.exists(self._root):
            for path in map(str, self._files.ls(self._root, detail=False)):
                if path.endswith(BESIDE):
                    self._remove(path)

    def _make_directory(self, path: str) -> None:
        if self._has_directories:
            self._files.makedirs(path, exist_ok=True)

    def _move(self, path: str, to: str) -> None:
        """File by file: stores differ in what else they call a move."""
        self._make_directory(to)
        for name in sorted(map(_last, self._files.find(path)), key=_manifest_last):
            self._files.cp_file(f"{path}/{name}", f"{to}/{name}")
        self._remove(path)

    def _see_arrived(self, file: Path, path: str) -> None:
        found, wanted = self._files.size(path), file.stat().st_size
        if found != wanted:
            raise OSError(f"{path} has {found} bytes in the store, expected {wanted}")

    def _remove(self, path: str) -> None:
        for what, whole in ((f"{path}/{MANIFEST}", False), (path, True)):
            with contextlib.suppress(FileNotFoundError):
                self._files.rm(what, recursive=whole)


def remote_of(config: Config) -> RemoteCheckpoints | None:
    """The store of `output.remote`, or None."""
    return RemoteCheckpoints(config.output.remote) if config.output.remote else None


def _names_in(directory: Path) -> list[str]:
    """The files in a directory and below."""
    return [p.relative_to(directory).as_posix() for p in directory.rglob("*") if p.is_file()]


def _manifest_last(name: str) -> bool:
    return name == MANIFEST


def _last(path: str) -> str:
    return path.rstrip("/").rpartition("/")[2]
