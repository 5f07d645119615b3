"""Nothing is ever lost: write beside, fsync, rename."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path


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
        with contextlib.suppress(FileNotFoundError):
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
