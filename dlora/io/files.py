"""Atomic files, and files that others wrote.

A file or a directory is written beside its final name, synced and renamed, so that a crash loses
nothing. Names read from a file may not leave their directory; a file that is no JSON object is
refused in one line, and so is a word that can be no path.
"""

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
    """Replace the content of a file; after a crash it has the old content or the new one."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(beside, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        with contextlib.suppress(OSError):  # renamed, or out of reach, as the error says
            beside.unlink()
    sync(path.parent)


@contextlib.contextmanager
def new_directory(final: Path) -> Iterator[Path]:
    """A temporary directory; renamed to `final` at the end of the block, deleted if it raises.

    `final` must not exist, or be empty. A directory of that name is complete, also after a power
    cut.
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


@contextlib.contextmanager
def replaced_directory(final: Path) -> Iterator[Path]:
    """A temporary directory that takes the place of `final` at the end of the block.

    After a crash `finish_replacing` leaves the old one or the new one, and it is complete.
    """
    shutil.rmtree(_newer(final), ignore_errors=True)  # of a crash, and older than what comes now
    with new_directory(_newer(final)) as folder:
        yield folder
    finish_replacing(final)


def finish_replacing(final: Path) -> None:
    """End a `replaced_directory` that a crash may have interrupted."""
    newer, older = _newer(final), final.with_name(f".{final.name}.old")
    if newer.is_dir():
        if final.exists():
            shutil.rmtree(older, ignore_errors=True)
            os.replace(final, older)
        os.replace(newer, final)
    elif older.is_dir() and not final.exists():
        os.replace(older, final)
    if final.parent.is_dir():
        shutil.rmtree(older, ignore_errors=True)
        sync(final.parent)


def _newer(final: Path) -> Path:
    return final.with_name(f".{final.name}.new")


def clear(directory: Path, pattern: str) -> None:
    """Delete the directories in `directory` whose names match `pattern`; ignore errors."""
    for found in directory.glob(pattern):
        shutil.rmtree(found, ignore_errors=True)


def unused_name(path: Path) -> Path:
    """`path` with the first of .old-1, .old-2, … that does not exist."""
    number = 1
    while (aside := path.with_name(f"{path.name}.old-{number}")).exists():
        number += 1
    return aside


def sync(path: Path) -> None:
    """Force a file's content, or the names in a directory, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def path_of(word: str | Path, option: str) -> Path:
    """The path that a user's word means, `~` expanded; nothing need be there.

    Args:
        option: what the user set, for errors.

    Raises:
        UsageError: it can be no path: a name in it is too long, links lead in a circle, the user of
            `~user` is unknown, or a directory may not be entered.
    """
    try:
        path = Path(word).expanduser()
        path.resolve()
        path.exists()
    except (OSError, RuntimeError, ValueError) as error:
        shown = str(word) if len(str(word)) <= 80 else f"{str(word)[:77]}..."
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"{option}: {shown}: is no path: {reason}") from None
    return path


# -- what others wrote --------------------------------------------------------------------------


def inside(directory: Path, name: object) -> Path:
    """The file `name` in a directory that others may have filled; it need not exist.

    A link may lead to another file in the directory or, in the hub's cache, from
    `snapshots/<revision>/` to a blob of the same repository.

    Raises:
        UsageError: it is no file name, or it or a link leads out of the directory.
    """
    path = directory / plain_name(directory, name)
    try:
        real, root = path.resolve(), directory.resolve()
    except (OSError, RuntimeError) as error:  # a ring of links
        raise UsageError(f"{path}: is not a file: {error}") from None
    snapshots = next((p for p in (root, *root.parents) if p.name == "snapshots"), None)
    is_blob = snapshots is not None and real.parent == snapshots.parent / "blobs"
    if not (is_blob or real.is_relative_to(root)):
        raise UsageError(f"{path}: is a link out of its directory, to {real}; copy that file")
    return path


def plain_name(directory: Path, name: object) -> str:
    """Check that `name`, which a file contains, is the path of a file in `directory`.

    Returns:
        The name.

    Raises:
        UsageError: it is no path, absolute, or leads out of the directory.
    """
    parts = PurePath(name).parts if isinstance(name, str) else ()
    if not parts or ".." in parts or PurePath(*parts).is_absolute() or "\0" in str(name):
        raise UsageError(f"{directory}: {name!r} is not the name of a file in it")
    return str(name)


def read_object(path: Path) -> dict[str, Any]:
    """Read the JSON object in a file.

    Raises:
        UsageError: it cannot be read, or is no JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path}: cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise UsageError(f"{path}: contains a JSON {type(value).__name__}, not an object")
    return value
