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


@dataclass(frozen=True)
class Hooks:
    """Callables, each called on every rank.

    Attributes:
        should_stop: asked after every step; true on any rank ends the run as SIGTERM does.
        should_save: asked after every step; true saves it, due or not. Ranks have to agree.
        saved: told of every save once it is written, with the step's line of the metrics and the
            checkpoint's directory: None on ranks other than 0, and where the disk refused.
    """

    should_stop: Callable[[], bool] = never
    should_save: Callable[[], bool] = never
    saved: Callable[[Mapping[str, Any], Path | None], None] = nobody


NO_HOOKS = Hooks()
