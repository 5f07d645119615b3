"""Where an adapter of a command line is: a directory, or a name in a library."""

from __future__ import annotations

from pathlib import Path

from dlora.errors import UsageError
from dlora.io.files import path_of
from dlora.library.same_base import Base
from dlora.library.store import Library


def place_of(name: str, library: Library | None, option: str) -> tuple[str | Path, Base | None]:
    """Where the adapter `name` is, a directory or a name in the library, which knows its base.

    Args:
        option: that gave the name, for errors.

    Raises:
        UsageError: it is both, or the library is none.
    """
    if library is None or (found := library.find(name)) is None:
        return name, None
    if path_of(name, option).exists():
        raise UsageError(
            f"{option}: {name} is a directory here and a name in {library.directory}; write "
            f"./{name} for the directory"
        )
    return found
