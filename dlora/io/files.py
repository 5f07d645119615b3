"""Nothing is ever lost: write beside, fsync, rename. And nothing that others wrote is trusted:
names stay inside their directory, and what is no JSON object is said in one line."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import Any

from dlora.errors import UsageError


def write_atomically(path: Path, content: bytes) -> None:
    """Replace `path` by `content`; a crash leaves the old file or the new one, never a mixture."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(beside, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        with contextlib.suppress(OSError):  # replaced, or out of reach as the error says
            beside.unlink()
    sync(path.parent)


@contextlib.contextmanager
def new_directory(final: Path) -> Iterator[Path]:
    """A temporary directory that gets the name `final` when the block ends well, and else vanishes.

    `final` must not exist, or be empty. What has the name is complete, also after a power cut.
    """
    beside = final.with_name(f".{final.name}.{os.getpid()}.tmp")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        yield beside
        for path in beside.rglob("*"):
            sync(path)
        sync(beside)
        os.replace(beside, final)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    sync(final.parent)


def clear(directory: Path, pattern: str) -> None:
    """Remove the directories in `directory` whose names match; what is out of reach stays."""
    for found in directory.glob(pattern):
        shutil.rmtree(found, ignore_errors=True)


def unused_name(path: Path) -> Path:
    """`path` with the first of .old-1, .old-2, … that is free: where it can be set aside."""
    number = 1
    while (aside := path.with_name(f"{path.name}.old-{number}")).exists():
        number += 1
    return aside


def sync(path: Path) -> None:
    """Make a file's content, or the renames in a directory, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# -- what others wrote --------------------------------------------------------------------------


def inside(directory: Path, name: object) -> Path:
    """The file `name` of a directory that a stranger may have filled; it need not be there.

    A link may lead to another place in the directory or, in the hub's cache, from
    `snapshots/<revision>/` to a blob of the same repository.

    Raises:
        UsageError: the name is none, or it or a link leads out of the directory.
    """
    path = directory / plain_name(directory, name)
    try:
        real, root = path.resolve(), directory.resolve()
    except (OSError, RuntimeError) as error:  # a ring of links
        raise UsageError(f"{path}: is no file: {error}") from None
    snapshots = next((p for p in (root, *root.parents) if p.name == "snapshots"), None)
    is_blob = snapshots is not None and real.parent == snapshots.parent / "blobs"
    if not (is_blob or real.is_relative_to(root)):
        raise UsageError(f"{path}: is a link out of its directory, to {real}; put a copy there")
    return path


def plain_name(directory: Path, name: object) -> str:
    """`name`, as a file in `directory` tells it, if it is a path that leads nowhere else.

    Raises:
        UsageError: it is none.
    """
    parts = PurePath(name).parts if isinstance(name, str) else ()
    if not parts or ".." in parts or PurePath(*parts).is_absolute() or "\0" in str(name):
        raise UsageError(f"{directory}: {name!r} is not the name of a file in it")
    return str(name)


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object that a file holds.

    Raises:
        UsageError: it cannot be read, or holds anything else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path}: cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise UsageError(f"{path}: holds a JSON {type(value).__name__}, not an object")
    return value
