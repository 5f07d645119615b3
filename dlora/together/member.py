"""One of the adapters that a run trains together: its own run, but for the passes."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any

from dlora.config.load import Config
from dlora.errors import UsageError
from dlora.runtime.console import console
from dlora.training.context import RunContext
from dlora.training.prepare import Preparation
from dlora.training.watchdogs import FiniteWatch, UnusedWatch


class Standing(enum.Enum):
    """Whether an adapter is trained, or why it has left."""

    RUNNING = "running"
    FINISHED = "finished"
    FAILED = "failed"
    DROPPED = "dropped"


@dataclass
class Member:
    """One adapter.

    Attributes:
        context: of its run, with its own configuration, replica and optimizer; its directory is
            `output.dir/adapters/NAME`.
        log: its metrics, once they are open.
        record: of its method, once it has left.
        why: it has left, where it has not finished.
    """

    name: str
    context: RunContext
    losses: FiniteWatch
    unused: UnusedWatch
    standing: Standing = Standing.RUNNING
    log: Any = None
    record: dict[str, Any] | None = None
    why: str = ""

    @property
    def config(self) -> Config:
        """Its own, of a run of it alone."""
        return self.context.config

    @property
    def prepared(self) -> Preparation:
        """Its data, settings and steps."""
        return self.context.prepared

    @property
    def total_steps(self) -> int:
        """Its optimizer steps."""
        return self.prepared.sampler.total_steps

    @property
    def running(self) -> bool:
        """Whether it is trained."""
        return self.standing is Standing.RUNNING

    def say(self, line: str) -> None:
        """Print a line about it."""
        console.info(f"{self.name}: {line}")


def left_in(state: dict[str, Any]) -> Standing:
    """How an adapter stands by its entry in a checkpoint's `state.json`.

    Raises:
        UsageError: no run writes that.
    """
    try:
        return Standing(state.get("standing", Standing.RUNNING.value))
    except ValueError as error:
        raise UsageError(f"state.json: standing: {error}") from None
