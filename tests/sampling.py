"""Cases of a matrix: some that run by default, and all of it where `-m full` asks."""

from collections.abc import Iterable
from typing import Any

import pytest


def full(*case: Any) -> Any:
    """A case that runs only where `-m full` asks."""
    return pytest.param(*case, marks=pytest.mark.full)


def sampled(sample: list[tuple[Any, ...]], matrix: Iterable[tuple[Any, ...]]) -> list[Any]:
    """`sample` by default."""
    return [*sample, *(full(*case) for case in matrix if case not in sample)]


def joined(case: tuple[Any, ...]) -> str:
    """The id of a case that is one argument, as if each part of it were one."""
    return "-".join(map(str, case))
