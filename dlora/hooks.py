"""What a program that runs `dlora.train.main` inside itself is asked and told."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Saved:
    """A checkpoint that is committed.

    Attributes:
        directory: on the disk of the rank that wrote it.
        url: in `output.remote`; None without one, and where the store refused it.
    """

    directory: Path
    url: str | None


Committed = Callable[[], Saved | None]


def never() -> bool:
    """No."""
    return False


def nobody(record: Mapping[str, Any], committed: Committed) -> None:
    """Nobody is told."""


def nothing() -> None:
    """Nothing happens, and nothing comes of it."""


@dataclass(frozen=True)
class Hooks:
    """Callables, each called on every rank. What they wait for, the run waits for.

    Attributes:
        enter: called first, before a file is read; its `UsageError` on any rank ends all of them.
        should_stop: asked in every step until a rank has been told to stop; true on any rank ends
            the run as SIGTERM does.
        should_save: asked in every step; true on any rank saves the step, due or not.
        saved: told of every save when it begins, with the step's line of the metrics and a function
            that waits until the checkpoint is committed and returns it: None on ranks that do not
            write, and where the disk refused. The run itself does not wait for that.
        lost: told that a peer, or the way to it, is gone, once what there is has been committed.
    """

    enter: Callable[[], None] = nothing
    should_stop: Callable[[], bool] = never
    should_save: Callable[[], bool] = never
    saved: Callable[[Mapping[str, Any], Committed], None] = nobody
    lost: Callable[[], None] = nothing


NO_HOOKS = Hooks()
