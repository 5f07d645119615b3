"""The one exception that means "the user can fix this", and how lists and types are written in it.

A `UsageError` becomes one line on standard error and exit status 2.
"""

from __future__ import annotations

from collections.abc import Sequence


class UsageError(ValueError):
    """A configuration, a data file or a path is wrong.

    The message is a single line that names the key, or the file and line, says what is wrong with
    it and what would be right. Entry points print it to standard error and exit with status 2.
    """

    def __init__(self, message: str):
        super().__init__(" ".join(message.split()))


class TransientError(Exception):
    """Ranks or a store cannot be reached: one line on standard error and exit status 1.

    Unlike after a `UsageError`, starting the run again may succeed.
    """


class LaterError(UsageError):
    """The option exists in the configuration, but what it asks for is not built yet."""

    def __init__(self, key: str, value: object):
        super().__init__(f"{key}: {value} is planned for later and does not work yet")


def and_more(names: Sequence[str], limit: int = 3) -> str:
    """The first `limit` names, and how many more there are: `"a, b, c and 4 more"`."""
    rest = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {rest} more" if rest > 0 else "")


def dtype_name(dtype: object) -> str:
    """A torch dtype as configurations name it: `"bfloat16"`."""
    return str(dtype).removeprefix("torch.")
