"""One reduction for several replicas: their gradient buffers lie end to end in one tensor.

    joint   [ gradients | scalars | padding ‖ gradients | scalars | padding ‖ … ]
               the buffer of a replica         of the next one

Each is divided by its own tokens and has its own norm, as if it had been reduced alone. A replica
whose buffers are made anew, since its tensors were cut or moved, is taken in again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from dlora.sharding.replica.flat_buffers import is_same_place
from dlora.sharding.replica.hierarchical_reduce import Reduction
from dlora.sharding.replica.replica import Replica
from dlora.sharding.replica.replicated_state import ReplicatedState
from dlora.sharding.replica.step_scalars import Reduced, Scalar


class Addend(NamedTuple):
    """What a rank adds to the sum for one replica; see `Replica.reduce_gradients`."""

    tokens: int
    scalars: Mapping[str, Scalar]
    each: int = 0


class JointReduction:
    """Reduces several replicas at once.

    Args:
        replicas: of the same ranks, dtype and device, with states that are not divided.
        reduction: theirs.
    """

    def __init__(self, replicas: Sequence[Replica], reduction: Reduction) -> None:
        self._replicas, self._reduction = list(replicas), reduction
        self._whole = torch.empty(0)

    def reduce_gradients(self, addends: Sequence[Addend]) -> list[Reduced]:
        """`Replica.reduce_gradients` of each replica, by one collective for all.

        With gradients that are sent in half precision there is one for each replica.
        """
        for replica, addend in zip(self._replicas, addends, strict=True):
            replica.before_reduction(addend.tokens)
        mine = [r.addends(*addend) for r, addend in zip(self._replicas, addends, strict=True)]
        if self._reduction.sent_as is not None:
            summed = [r.strategy.sum_(own) for r, own in zip(self._replicas, mine, strict=True)]
        else:
            self._lay_out()
            extras = [s.put(own) for s, own in zip(self._strategies, mine, strict=True)]
            self._reduction.sum_(self._whole)
            summed = [s.summed(own) for s, own in zip(self._strategies, extras, strict=True)]
        each = zip(self._replicas, summed, addends, strict=True)
        return [replica.reduced(sums, addend.scalars) for replica, sums, addend in each]

    @property
    def _strategies(self) -> list[ReplicatedState]:
        found = [replica.strategy for replica in self._replicas]
        return [strategy for strategy in found if isinstance(strategy, ReplicatedState)]

    def _lay_out(self) -> None:
        """Let all buffers lie in the joint one."""
        buffers = [replica.buffers for replica in self._replicas]
        lengths = [len(b.gradients) for b in buffers]
        if len(self._whole) == sum(lengths):
            parts = self._whole.split(lengths)
            if all(is_same_place(b.gradients, p) for b, p in zip(buffers, parts, strict=True)):
                return
        self._whole = buffers[0].gradients.new_empty(sum(lengths))
        for buffer, part in zip(buffers, self._whole.split(lengths), strict=True):
            buffer.lie_in(part)
