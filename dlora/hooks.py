"""Callables by which a program that calls `dlora.train.main` follows and steers a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Saved:
    """A checkpoint that is committed.

    Attributes:
        directory: on the disk of the rank that wrote it.
        url: in `output.remote`; None without one, if the copy failed, or gave way to newer ones.
    """

    directory: Path
    url: str | None


Committed = Callable[[], Saved | None]


def never() -> bool:
    """The default answer of `should_stop` and `should_save`: False."""
    return False


def never_dropped(name: str) -> bool:
    """The default answer of `should_drop`: False."""
    return False


def nothing(*_: object) -> None:
    """The default of every other hook: does nothing."""


@dataclass(frozen=True)
class Hooks:
    """Callables, each called on every rank. The run waits for each of them to return.

    Attributes:
        enter: called first, before a file is read; its `UsageError` on any rank ends all ranks.
        should_stop: called in every step until the run stops; True on any rank ends the run as
            SIGTERM does.
        should_save: called in every step; True on any rank saves the step, due or not.
        should_drop: called in every step of a run of several adapters with the name of each that
            is trained; True on any rank ends its training: it leaves without a written adapter,
            and the others go on.
        saved: called when a save begins, with the step's line of the metrics and a function that
            waits until the checkpoint is committed and returns it: None on ranks that do not
            write, and if the write failed. The run itself does not wait for the commit.
        logged: called with every line of the metrics, as (step, figures), once the run has logged
            it; `figures` is the line, a copy. `wire_bytes` in it are this rank's own. Of several
            adapters each has lines of its own, with its name as `adapter`.
        lost: called when the connection to a peer is lost, after the last whole step has been
            committed.
    """

    enter: Callable[[], None] = nothing
    should_stop: Callable[[], bool] = never
    should_save: Callable[[], bool] = never
    should_drop: Callable[[str], bool] = never_dropped
    saved: Callable[[Mapping[str, Any], Committed], None] = nothing
    logged: Callable[[int, Mapping[str, Any]], None] = nothing
    lost: Callable[[], None] = nothing

    def within(self, context: Callable[[], AbstractContextManager[None]]) -> Hooks:
        """The same, those of a step each called inside a `context()`."""
        names = ("should_stop", "should_save", "should_drop", "saved", "logged")
        return replace(self, **{name: _within(context, getattr(self, name)) for name in names})


def _within(
    context: Callable[[], AbstractContextManager[None]], hook: Callable[..., T]
) -> Callable[..., T]:
    def call(*args: Any) -> T:
        with context():
            return hook(*args)

    return call


NO_HOOKS = Hooks()
