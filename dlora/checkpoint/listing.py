"""The directory of a run's checkpoints: which there are, and which is the newest that is whole."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dlora.checkpoint.format import LATEST, STEP_DIRECTORY, verify
from dlora.errors import UsageError
from dlora.io.files import clear, sync, unused_name


def steps_in(root: Path) -> list[tuple[int, Path]]:
    """(step, directory) of each, the oldest first."""
    if not root.is_dir():
        return []
    found = [(STEP_DIRECTORY.fullmatch(path.name), path) for path in root.iterdir()]
    return sorted((int(match[1]), path) for match, path in found if match)


def newest(root: Path, warn: Any = print, check: Callable[[Path], object] = verify) -> Path | None:
    """The newest checkpoint under `root` that verifies; None if there is none.

    Args:
        warn: called with a line for each one that is skipped.
        check: raises a `UsageError` for a checkpoint that is to be skipped.
    """
    for _, directory in reversed(steps_in(root)):
        try:
            check(directory)
        except UsageError as error:
            warn(f"skipping a checkpoint: {error}")
        else:
            return directory
    return None


def set_aside_after(step: int, root: Path) -> None:
    """Move the checkpoints past `step` into a directory beside `root`; delete unfinished ones."""
    clear(root, ".step-*")  # the caller has the run's lock, so nobody writes them any more
    newer = [directory for number, directory in steps_in(root) if number > step]
    if newer:
        aside = unused_name(root)
        aside.mkdir()
        for directory in newer:
            os.rename(directory, aside / directory.name)
        (root / LATEST).unlink(missing_ok=True)
        sync(root)
