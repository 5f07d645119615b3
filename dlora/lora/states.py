"""The life cycle of an adapter, and which state may follow which."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from enum import Enum
from typing import Any, ClassVar

from torch import Tensor

from dlora.errors import UsageError, dtype_name
from dlora.lora.own_storage import OwnStorage


class AdapterState(Enum):
    """What a layer computes with. Each value is the state in words, for errors.

    Attributes:
        UNSTARTED: as ON, but A and B are to be replaced by a start from gradients before training.
        ON: W0 + ΔW.
        OFF: W0 alone, inside `dlora.disabled`.
        MERGED: its weight, which is W0 + ΔW by itself, until `dlora.unmerge`.
        EMPTY: W0 alone for good: its method has pruned A and B to rank 0.
    """

    UNSTARTED = "waits for dlora.start_from_gradients"
    ON = "is switched on"
    OFF = "is switched off"
    MERGED = "is merged"
    EMPTY = "has no rank left"


_FOLLOWING = {
    AdapterState.UNSTARTED: {AdapterState.ON, AdapterState.OFF},
    AdapterState.ON: {AdapterState.OFF, AdapterState.MERGED, AdapterState.EMPTY},
    AdapterState.OFF: {AdapterState.UNSTARTED, AdapterState.ON, AdapterState.EMPTY},
    AdapterState.MERGED: {AdapterState.ON},
    AdapterState.EMPTY: set[AdapterState](),
}


class Stateful(OwnStorage):
    """A child of an adapted layer that is in one of the states.

    Attributes:
        place: its path in the model.
        state: changed by `become` alone.
        replicated: whether a replica owns its parameters, in their dtype.
    """

    what: ClassVar[str] = "adapter"
    place: str
    state = AdapterState.ON
    replicated = False

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Stateful:
        self.check_cast(fn)
        return super()._apply(fn, recurse)

    def check_cast(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Raise a `UsageError` if `fn`, of a call like `.to()`, casts parameters of a replica."""
        parameter = next(self.parameters(), None) if self.replicated else None
        if parameter is None:
            return
        cast = fn(parameter.new_empty(0)).dtype
        if cast != parameter.dtype:
            raise UsageError(
                f"the adapters are the replica's, in {dtype_name(parameter.dtype)}, and cannot be "
                f"cast to {dtype_name(cast)}; cast the base only, before dlora.attach "
                "(from_pretrained(…, dtype=…)), or compute under torch.autocast"
            )

    def become(self, state: AdapterState) -> None:
        """Change the state.

        Raises:
            UsageError: it may not follow the present one.
        """
        if state not in _FOLLOWING[self.state]:
            raise UsageError(
                f"the {self.what} {self.state.value}, so it cannot become one that {state.value}"
            )
        self.state = state


@contextmanager
def switched_off(children: Iterable[Any]) -> Iterator[None]:
    """Inside, these adapters and copies are off; those that have been switched since stay so."""
    idle = (AdapterState.OFF, AdapterState.EMPTY)
    before = [(child, child.state) for child in children if child.state not in idle]
    for child, _ in before:
        child.become(AdapterState.OFF)
    try:
        yield
    finally:
        for child, state in before:
            if child.state is AdapterState.OFF:
                child.become(state)
