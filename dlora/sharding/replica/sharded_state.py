"""Optimizer state divided over ranks, for adapters whose state does not fit on each of them.

    gradients  [ g0 | g1 | g2 … | padding ]   reduce-scattered: each rank gets one of N equal parts
    values     [ p0 | p1 | p2 … | padding ]   stepped part by part, then all-gathered

The two halves send what one all-reduce sends. Scalars have a small reduction of their own, together
with the part's Σ g², from which the norm is computed. An optimizer gets, for each tensor, a 1-D
parameter that is a view of the part's elements of it, empty where the part has none. So groups are
alike on all ranks, and an optimizer that treats each element alone (AdamW, SGD) computes what it
would on whole tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dlora.errors import UsageError
from dlora.sharding.replica.flat_shards import FlatShards
from dlora.sharding.replica.hierarchical_reduce import (
    Reduction,
    divisible,
    part_of,
    reduction_bytes,
)
from dlora.sharding.replica.optimizer_state import (
    LocalSlice,
    Named,
    ReplicaError,
    States,
    count,
    item,
)
from dlora.sharding.replica.state_gathering import StateKind, gather_ranges, kinds_by_rank
from dlora.sharding.replica.step_scalars import Scalar, fill_, tail_length
from dlora.sharding.topology import Topology


class ShardedState:
    """The optimizer's work on one of N parts."""

    collective_saves = True

    def __init__(self, named: Named, reduction: Reduction) -> None:
        self._named, self._reduction = named, reduction
        self._has_optimizer = False
        self.optimized: dict[str, nn.Parameter] = {}
        self.rebuild_layout()

    def rebuild_layout(self) -> None:
        topology = self._reduction.topology
        self._shards = FlatShards(self._named, topology)
        first = part_of(topology.rank, topology) * self._shards.size
        self._own = slice(first, first + self._shards.size)

    @staticmethod
    def lengths(named: Named, topology: Topology) -> tuple[int, int]:
        length = divisible(count(named), topology)
        return length, length

    @staticmethod
    def elements(named: Named, topology: Topology) -> int:
        return divisible(count(named), topology) // topology.world

    @staticmethod
    def wire_bytes(named: Named, topology: Topology, sent: int | None = None) -> float:
        numel, own = divisible(count(named), topology), item(named)
        scalars = torch.float64.itemsize * _scalars(named, topology)
        halves = numel * (own if sent is None else sent), numel * own  # gradients, then values
        wholes = sum(reduction_bytes(half, topology) / 2 for half in halves)
        return wholes + reduction_bytes(scalars, topology)

    def attach_buffers(
        self, values: Tensor, buffer: Tensor, gradient_views: Mapping[str, Tensor]
    ) -> None:
        self._values, self._buffer = values, buffer
        self.gradients, self.values = buffer[self._own], values[self._own]
        self._gradient_parts, offset = {}, 0
        for name, parameter in self._named.items():
            local = self._shards.local(name)
            own = slice(offset + local.start, offset + local.stop)
            self._gradient_parts[name] = buffer[own]
            part = self.optimized.setdefault(name, nn.Parameter(values[own]))
            had_gradient, part.grad = part.grad is not None, None
            part.data = values[own]
            part.grad = self._gradient_parts[name] if had_gradient else None
            offset += parameter.numel()

    def attach_optimizer(self, optimizer: Optimizer, before_step: Callable[[], None]) -> None:
        """From now on each of its steps ends with gathering the values."""
        whole = {id(parameter) for parameter in self._named.values()}
        if any(id(p) in whole for group in optimizer.param_groups for p in group["params"]):
            raise ReplicaError(
                "the optimizer has whole tensors while its state is to be divided over ranks; "
                "give it replica.parameter_groups(...)"
            )
        optimizer.register_step_pre_hook(lambda *_: before_step())
        optimizer.register_step_post_hook(lambda *_: self._reduction.gather_(self._values))
        self._has_optimizer = True

    def sum_(self, scalars: Sequence[Scalar]) -> Tensor:
        if not self._has_optimizer:
            raise ReplicaError(
                "the optimizer state is divided over ranks, and its steps end with a collective: "
                "call replica.attach_optimizer(optimizer) once, before the first step"
            )
        if self._reduction.sent_as is None:
            self._reduction.scatter_(self._buffer)
        else:
            self._reduction.scatter_rounded_(self._buffer)
        length = _scalars(self._named, self._reduction.topology)
        sums = self.gradients.new_zeros(length, dtype=torch.float64)
        fill_(sums[: len(scalars)], scalars)
        sums[-1] = torch.linalg.vector_norm(self.gradients, dtype=torch.float64).square()
        self._reduction.sum_(sums)
        self._norm = sums[-1].sqrt()
        return torch.cat([sums[: len(scalars)], self._norm[None]])

    def finalize_gradients(self, present: Mapping[str, bool], divisor: int) -> None:
        for name, part in self.optimized.items():
            self._named[name].grad = None  # most of its mean is on other ranks
            mine = present[name] and part.numel()
            part.grad = self._gradient_parts[name] if mine else None
        self.gradients.div_(divisor)
        self._norm = self._norm / divisor

    def has_gradient(self, name: str) -> bool:
        """Whether its part has one: `optimizer.zero_grad(set_to_none=False)` makes it zero."""
        return self.optimized[name].grad is not None

    def zero_grad(self) -> None:
        for part in self.optimized.values():
            part.grad = None

    def norm(self) -> Tensor:
        return self._norm

    def scale_(self, factor: float | Tensor) -> None:
        self.gradients.mul_(factor)
        self._norm = self._norm * factor

    def local_slices(self) -> dict[str, LocalSlice]:
        slices, offset = {}, 0
        for name in self._named:
            local = self._shards.local(name)
            slices[name] = LocalSlice(offset, local.start, local.stop)
            offset += local.stop - local.start
        return slices

    def combine(self, flat: Tensor) -> Tensor:
        return self._reduction.sum_of(flat)

    def gather_full(
        self, states: States, *, everywhere: bool = False
    ) -> Iterator[tuple[str, str, Tensor]]:
        """See `StateStrategy`; states without dims are those of a tensor's first part.

        Raises:
            UsageError: on every rank: a state is not one number for each element.
            ReplicaError: on every rank: ranks have different states of one tensor.
        """
        topology = self._reduction.topology
        gets = everywhere or topology.rank == 0
        for name, slots in self._agreed_kinds(states).items():
            parameter, local = self._named[name].detach(), self._shards.local(name)
            for slot, kind in slots.items():
                if kind.value is None:
                    mine = states[name][slot] if local.stop > local.start else None
                    like = parameter.new_empty(0, dtype=kind.torch_dtype)
                    ranges = self._shards.ranges(name)
                    flat = gather_ranges(mine, ranges, like, topology, everywhere=everywhere)
                    if gets:
                        yield name, slot, flat.view(parameter.shape)
                elif gets:
                    yield name, slot, torch.tensor(kind.value, dtype=kind.torch_dtype)

    def local_part(self, name: str, state: Tensor) -> Tensor | None:
        local = self._shards.local(name)
        if local.start == local.stop:
            return None
        return state.reshape(-1)[local.start : local.stop] if state.ndim else state

    def _agreed_kinds(self, states: States) -> dict[str, dict[str, StateKind]]:
        """The kinds of state of each tensor, once it is clear that its ranks agree."""
        device = self._values.device
        by_rank = kinds_by_rank(states, self._reduction.topology, device)
        agreed = {}
        for name in self._named:
            found = {}
            for rank, start, stop in self._shards.ranges(name):
                slots = by_rank[rank].get(name, {})
                for slot, kind in slots.items():
                    if kind.value is None and kind.shape != [stop - start]:
                        raise UsageError(
                            "sharding.optimizer_state: divided needs an optimizer that treats each "
                            f"element alone; this one has {slot} of shape {kind.shape} for {name}"
                        )
                found[rank] = {slot: (kind.dtype, kind.value) for slot, kind in slots.items()}
            first = next(iter(found), 0)
            for rank, described in found.items():
                if described != found[first]:
                    raise ReplicaError(
                        f"ranks {first} and {rank} have different optimizer states of {name}: "
                        f"{found[first]} and {described}"
                    )
            agreed[name] = by_rank[first].get(name, {}) if found else {}
        return agreed


def _scalars(named: Named, topology: Topology) -> int:
    """Presence of each tensor, the tail, padding, and Σ g²."""
    return divisible(len(named) + tail_length(topology.world) + 1, topology)
