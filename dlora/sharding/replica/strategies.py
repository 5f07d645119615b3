"""Which strategy an optimizer's state has."""

from __future__ import annotations

from dlora.sharding.replica.optimizer_state import StateStrategy
from dlora.sharding.replica.owned_state import OwnedState
from dlora.sharding.replica.replicated_state import ReplicatedState
from dlora.sharding.replica.sharded_state import ShardedState


def strategy_class(divided: bool, world: int = 1) -> type[StateStrategy]:
    """How the optimizer's state and work are distributed over `world` ranks.

    Without `divided`, an optimizer that works in units still steps each on one of several ranks;
    buffers and reductions are the same as of `ReplicatedState`.
    """
    if divided:
        return ShardedState
    return OwnedState if world > 1 else ReplicatedState
