"""Values made of the trained tensors that all passes of one optimizer step share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from torch import Tensor

T = TypeVar("T")
Shared = Callable[[str, Callable[[], Tensor]], Tensor]  # (name, how it is made) → the value


def made_anew(name: str, make: Callable[[], T]) -> T:
    """Where nothing is shared: what `make` returns."""
    return make()


class StepValues:
    """Shared by all adapters of a model.

    Nothing is kept unless somebody says that the trained tensors stay as they are: no version or
    address of a tensor tells, as its memory may be written as a part of another one.
    """

    def __init__(self) -> None:
        self._made: dict[str, object] | None = None

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Inside, trained tensors do not change: what passes have in common is made once."""
        previous, self._made = self._made, {}
        try:
            yield
        finally:
            self._made = previous

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Inside, nothing is shared: other tensors stand in the place of the trained ones."""
        previous, self._made = self._made, None
        try:
            yield
        finally:
            self._made = previous

    def get(self, key: str, make: Callable[[], T]) -> T:
        """What `make` returns, or has returned for this key before."""
        if self._made is None:
            return make()
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]  # type: ignore[return-value]
