"""Optimizer state divided over ranks, for adapters whose state does not fit on each of them.

    gradients  [ g0 | g1 | g2 … | padding ]   reduce-scattered: of N equal parts each rank gets one
    values     [ p0 | p1 | p2 … | padding ]   stepped part by part, then all-gathered

The two halves send what one all-reduce sends. Scalars go in a small one of their own, together with
the part's Σ g², of which the norm is made. An optimizer gets, for each tensor, a 1-D parameter that
is a view of the part's elements of it, empty where the part has none: so groups are alike on all
ranks, and an optimizer that treats each element alone (AdamW, SGD) computes what it would on whole
tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dlora.sharding.replica.flat_shards import Parts, gathered
from dlora.sharding.replica.hierarchical_reduce import (
    Reduction,
    divisible,
    part_of,
    reduction_bytes,
)
from dlora.sharding.replica.optimizer_state import Held, Named, ReplicaError, States, count, item
from dlora.sharding.replica.step_scalars import tail_length
from dlora.sharding.topology import Topology


class DividedShare:
    """The optimizer's work on one of N parts."""

    collective_saves = True

    def __init__(self, named: Named, reduction: Reduction) -> None:
        self._named, self._reduction = named, reduction
        self._driven = False
        self.optimized: dict[str, nn.Parameter] = {}
        self.rebuild_layout()

    def rebuild_layout(self) -> None:
        topology = self._reduction.topology
        self._parts = Parts(self._named, topology)
        first = part_of(topology.rank, topology) * self._parts.size
        self._own = slice(first, first + self._parts.size)

    @staticmethod
    def lengths(named: Named, topology: Topology) -> tuple[int, int]:
        length = divisible(count(named), topology)
        return length, length

    @staticmethod
    def elements(named: Named, topology: Topology) -> int:
        return divisible(count(named), topology) // topology.world

    @staticmethod
    def wire_bytes(named: Named, topology: Topology) -> float:
        flat = divisible(count(named), topology) * item(named)
        scalars = torch.float64.itemsize * _scalars(named, topology)
        return reduction_bytes(flat, topology) + reduction_bytes(scalars, topology)

    def bind(self, values: Tensor, buffer: Tensor, gradient_views: Mapping[str, Tensor]) -> None:
        self._values, self._buffer = values, buffer
        self.gradients, self.values = buffer[self._own], values[self._own]
        self._gradient_parts, offset = {}, 0
        for name, parameter in self._named.items():
            here = self._parts.here(name)
            span = slice(offset + here.start, offset + here.stop)
            self._gradient_parts[name] = buffer[span]
            part = self.optimized.setdefault(name, nn.Parameter(values[span]))
            had_gradient, part.grad = part.grad is not None, None
            part.data = values[span]
            part.grad = self._gradient_parts[name] if had_gradient else None
            offset += parameter.numel()

    def drive(self, optimizer: Optimizer, before_step: Callable[[], None]) -> None:
        """From now on each of its steps ends with gathering the values."""
        whole = {id(parameter) for parameter in self._named.values()}
        if any(id(p) in whole for group in optimizer.param_groups for p in group["params"]):
            raise ReplicaError(
                "the optimizer holds whole tensors while its state is to be divided over ranks; "
                "give it replica.parameter_groups(...)"
            )
        optimizer.register_step_pre_hook(lambda *_: before_step())
        optimizer.register_step_post_hook(lambda *_: self._reduction.gather_(self._values))
        self._driven = True

    def sum_(self, scalars: list[float]) -> list[float]:
        if not self._driven:
            raise ReplicaError(
                "the optimizer state is divided over ranks, and its steps end with a collective: "
                "call replica.drive(optimizer) once, before the first step"
            )
        self._reduction.scatter_(self._buffer)
        length = _scalars(self._named, self._reduction.topology)
        sums = self.gradients.new_zeros(length, dtype=torch.float64)
        sums[: len(scalars)] = torch.tensor(scalars, dtype=torch.float64)
        sums[-1] = torch.linalg.vector_norm(self.gradients, dtype=torch.float64).square()
        self._reduction.sum_(sums)
        self._norm = sums[-1].sqrt()
        return sums[: len(scalars)].tolist()

    def finalize_gradients(self, present: Mapping[str, bool], divisor: int) -> None:
        for name, part in self.optimized.items():
            self._named[name].grad = None  # most of its mean is on other ranks
            mine = present[name] and part.numel()
            part.grad = self._gradient_parts[name] if mine else None
        self.gradients.div_(divisor)
        self._norm = self._norm / divisor

    def has_gradient(self, name: str) -> bool:
        """`optimizer.zero_grad(set_to_none=False)` keeps gradients, and makes them zero."""
        return self.optimized[name].grad is not None

    def zero_grad(self) -> None:
        for part in self.optimized.values():
            part.grad = None

    def norm(self) -> Tensor:
        return self._norm

    def scale_(self, factor: Tensor) -> None:
        self.gradients.mul_(factor)
        self._norm = self._norm * factor

    def held(self) -> dict[str, Held]:
        places, offset = {}, 0
        for name in self._named:
            here = self._parts.here(name)
            places[name] = Held(offset, here.start, here.stop)
            offset += here.stop - here.start
        return places

    def join(self, flat: Tensor) -> Tensor:
        return self._reduction.sum_of(flat)

    def whole(
        self, states: States, *, everywhere: bool = False
    ) -> Iterator[tuple[str, str, Tensor]]:
        return gathered(self._parts, self._named, states, everywhere=everywhere)

    def part(self, name: str, state: Tensor) -> Tensor | None:
        here = self._parts.here(name)
        if here.start == here.stop:
            return None
        return state.reshape(-1)[here.start : here.stop] if state.ndim else state


def _scalars(named: Named, topology: Topology) -> int:
    """Presence of each tensor, the tail, padding, and Σ g²."""
    return divisible(len(named) + tail_length(topology.world) + 1, topology)
