"""How an entry point ends: one line, printed once for all ranks, and an exit status."""

from __future__ import annotations

import sys
from collections.abc import Callable

from dlora.errors import TransientError, UsageError


class PrintedError(UsageError):
    """A `UsageError` that has been printed, on this rank or on another."""


class PrintedTransientError(TransientError):
    """A `TransientError` that has been printed, on this rank or on another."""


def exit_with(main: Callable[[list[str]], int]) -> None:
    """Run an entry point and end the process with its status; a user's mistake is one line and
    status 2, a `TransientError` one line and status 1.
    """
    try:
        status = main(sys.argv[1:])
    except (UsageError, TransientError) as error:
        if not isinstance(error, (PrintedError, PrintedTransientError)):
            print_error(str(error))
        status = 1 if isinstance(error, TransientError) else 2
    raise SystemExit(status)


def as_printed(message: str, passes: bool) -> UsageError | TransientError:
    """The exception for a printed error; `passes`: whether trying again may help."""
    return PrintedTransientError(message) if passes else PrintedError(message)


def print_error(message: str) -> None:
    """Print the error that ends a run, to standard error."""
    print(f"dlora: error: {message}", file=sys.stderr, flush=True)
