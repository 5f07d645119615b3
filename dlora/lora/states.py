"""The life cycle of an adapter, and which state may follow which."""

from __future__ import annotations

from enum import Enum
from typing import ClassVar

from dlora.errors import UsageError
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
    """

    what: ClassVar[str] = "adapter"
    place: str
    state = AdapterState.ON

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
