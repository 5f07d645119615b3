"""What a program that runs `dlora.train.main` inside itself is asked and told."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


def never() -> bool:
    """No."""
    return False


def nobody(record: Mapping[str, Any], checkpoint: Path | None) -> None:
    """Nobody is told."""


def nothing() -> None:
    """Nothing happens."""


@dataclass(frozen=True)
class Hooks:
    """Callables, each called on every rank.

    Attributes:
        should_stop: asked in every step until a rank has been told to stop; true on any rank ends
            the run as SIGTERM does. It may not wait for other ranks.
        should_save: asked after every step; true saves it, due or not. Ranks have to agree.
        saved: told of every save once it is written, with the step's line of the metrics and the
            checkpoint's directory: None on ranks other than 0, and where the disk refused.
        lost: told that a peer, or the way to it, is gone, once what there is has been committed.
    """

    should_stop: Callable[[], bool] = never
    should_save: Callable[[], bool] = never
    saved: Callable[[Mapping[str, Any], Path | None], None] = nobody
    lost: Callable[[], None] = nothing


NO_HOOKS = Hooks()
