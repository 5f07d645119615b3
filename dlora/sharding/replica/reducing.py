"""What a replica does once in a step: its gradients become means, by one sum over ranks.

It has two halves, so that several replicas can have the sum in common (`joint.py`).
"""

from __future__ import annotations

import ctypes
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from dlora.sharding.counts import whole_number
from dlora.sharding.replica.flat_buffers import FlatBuffers
from dlora.sharding.replica.optimizer_state import ReplicaError, StateStrategy
from dlora.sharding.replica.step_scalars import (
    MOST_SCALARS,
    Reduced,
    Scalar,
    pack_tail,
    unpack_tail,
)
from dlora.sharding.topology import Topology

AUDIT_EVERY = 10  # optimizer steps between two comparisons of checksums


class Reducing(ABC):
    """The part of `Replica` that reduces gradients."""

    topology: Topology
    strategy: StateStrategy
    named: dict[str, nn.Parameter]
    present: dict[str, bool]
    reductions: int
    unreduced: bool
    _buffers: FlatBuffers

    def reduce_gradients(
        self,
        tokens: int | Tensor | None = None,
        *,
        scalars: Mapping[str, Scalar] | None = None,
        each: int = 0,
    ) -> Reduced:
        """Replace every gradient by its mean over ranks: one reduction, the same bits everywhere.

        Where the optimizer state is divided, the mean is that of this rank's part, as `.grad` of
        `optimized`; the parameters themselves have none then.

        Args:
            tokens: with losses summed over this rank's target tokens since the last step, their
                number; gradients then become Σ grad / Σ tokens, the mean over all target tokens of
                all ranks. Without it they become Σ grad / world.
            scalars: up to 16 numbers by name, which are summed over ranks in the same reduction;
                every rank must give the same names in the same order. One that is a tensor is not
                read before the sum is: the one moment of a step at which the host waits for a GPU.
            each: an integer ≥ 0, below 2^48, of this rank, which every rank gets.

        Raises:
            ReplicaError: adapters are missing or were cast, there are too many scalars, or (every
                10th time) the adapters differ between ranks; see `audit`.
            UsageError: `tokens` is no whole number.
        """
        self.before_reduction(1 if tokens is None else whole_number(tokens))
        given = dict(scalars or {})
        mine = self.addends(tokens, given, each)
        return self.reduced(self.strategy.sum_(mine), given)

    def before_reduction(self, tokens: int) -> None:  # noqa: B027 - nothing, for most
        """Comes before every reduction.

        Args:
            tokens: the weight of this rank's gradients in the mean over ranks.
        """

    def addends(
        self, tokens: int | Tensor | None, scalars: Mapping[str, Scalar], each: int
    ) -> list[Scalar]:
        """What this rank adds to the sum beside its gradients, which lie in the buffer now."""
        if not self.named:
            raise ReplicaError("there is nothing to reduce: attach adapters first")
        if len(scalars) > MOST_SCALARS:
            raise ReplicaError(
                f"{len(scalars)} scalars do not fit the {MOST_SCALARS} slots beside the gradients"
            )
        self._buffers.check()
        self.unreduced = False
        present = self._buffers.collect(self.strategy.has_gradient)
        rank, world = self.topology.rank, self.topology.world
        count = 1 if tokens is None else whole_number(tokens)
        return [*present, *pack_tail(count, scalars, each, rank, world)]

    def reduced(self, summed: Tensor, scalars: Mapping[str, Scalar]) -> Reduced:
        """Make means of the summed gradients, and read what was summed beside them.

        Args:
            summed: as of `StateStrategy.sum_`.
        """
        *received, norm = summed.tolist()
        world = self.topology.world
        found = unpack_tail(received[len(self.named) :], list(scalars), world)
        ranks_with = dict(zip(self.named, received, strict=False))
        self.present = {name: ranks > 0 for name, ranks in ranks_with.items()}
        divisor = max(found.tokens, 1)
        self.strategy.finalize_gradients(self.present, divisor)
        found = replace(found, norm=self._rounded(norm / divisor))
        self.reductions += 1
        if self.reductions % AUDIT_EVERY == 0:
            self.audit()
        return found

    def _rounded(self, number: float) -> float:
        """A number in the precision of the values, where the last bits of ranks' own sums go."""
        return number if self.values.dtype == torch.float64 else ctypes.c_float(number).value

    @property
    @abstractmethod
    def values(self) -> Tensor:
        """See `Replica.values`."""

    @abstractmethod
    def audit(self) -> None:
        """See `Replica.audit`."""
