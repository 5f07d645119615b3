"""The plain case: every rank does all of the optimizer's work, with all of its state."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from dlora.sharding.replica.hierarchical_reduce import (
    Reduction,
    padded,
    reduction_bytes,
    rounded_bytes,
)
from dlora.sharding.replica.optimizer_state import LocalSlice, Named, States, count, item
from dlora.sharding.replica.step_scalars import Scalar, fill_, tail_length
from dlora.sharding.topology import Topology


class ReplicatedState:
    """Every rank does all of it: the sums are all-reduced, with the scalars in the buffer's tail.

    buffer  [ gradients | scalars | padding ]
    """

    @property
    def collective_saves(self) -> bool:
        return False

    def __init__(self, named: Named, reduction: Reduction) -> None:
        self.optimized = dict(named)
        self._reduction = reduction

    @staticmethod
    def lengths(named: Named, topology: Topology) -> tuple[int, int]:
        numel = count(named)
        return numel, padded(numel + len(named) + tail_length(topology.world), topology)

    @staticmethod
    def elements(named: Named, topology: Topology) -> int:
        return count(named)

    @staticmethod
    def wire_bytes(named: Named, topology: Topology, sent: int | None = None) -> float:
        if sent is not None:
            extras = padded(len(named) + tail_length(topology.world), topology) * item(named)
            beside = reduction_bytes(extras, topology)
            return rounded_bytes(count(named), sent, topology) + beside
        return reduction_bytes(ReplicatedState.lengths(named, topology)[1] * item(named), topology)

    def attach_buffers(
        self, values: Tensor, buffer: Tensor, gradient_views: Mapping[str, Tensor]
    ) -> None:
        numel = count(self.optimized)
        self.gradients, self.values = buffer[:numel], values[:numel]
        self._buffer, self._views = buffer, gradient_views

    def attach_optimizer(self, optimizer: Optimizer, before_step: Callable[[], None]) -> None:
        """Equal steps on equal tensors: nothing to do."""

    def sum_(self, scalars: Sequence[Scalar]) -> Tensor:
        extras = self.put(scalars)
        if self._reduction.sent_as is None:
            self._reduction.sum_(self._buffer)
        else:  # counts and flags are exact
            self._reduction.sum_rounded_(self.gradients)
            extras.copy_(self._reduction.sum_of(extras))
        return self.summed(extras)

    def put(self, scalars: Sequence[Scalar]) -> Tensor:
        """Where scalars are summed with the gradients, with this rank's in it."""
        extras = self._buffer[len(self.gradients) :][: len(scalars)]
        fill_(extras, scalars)
        return extras

    def summed(self, extras: Tensor) -> Tensor:
        """What `sum_` returns, once both are sums."""
        return torch.cat([extras.double(), self.norm()[None]])

    def finalize_gradients(self, present: Mapping[str, bool], divisor: int) -> None:
        for name, parameter in self.optimized.items():
            parameter.grad = self._views[name] if present[name] else None
        self.gradients.div_(divisor)

    def has_gradient(self, name: str) -> bool:
        return False

    def zero_grad(self) -> None:
        """Nothing to do: they are the parameters' own."""

    def norm(self) -> Tensor:
        return torch.linalg.vector_norm(self.gradients, dtype=torch.float64)

    def scale_(self, factor: float | Tensor) -> None:
        self.gradients.mul_(factor)

    def local_slices(self) -> dict[str, LocalSlice]:
        places, offset = {}, 0
        for name, parameter in self.optimized.items():
            places[name] = LocalSlice(offset, 0, parameter.numel())
            offset += parameter.numel()
        return places

    def combine(self, flat: Tensor) -> Tensor:
        return self._reduction.sum_of(flat) / self._reduction.topology.world

    def gather_full(
        self, states: States, *, everywhere: bool = False
    ) -> Iterator[tuple[str, str, Tensor]]:
        for name, slots in states.items():
            for slot, state in slots.items():
                yield name, slot, state

    def local_part(self, name: str, state: Tensor) -> Tensor | None:
        return state

    def rebuild_layout(self) -> None:
        """Nothing depends on shapes but what `attach_buffers` gets."""
