"""An optimizer's work distributed over ranks in units: tensors that are stepped together.

    gradients   whole on every rank            (as where everything is replicated)
    a unit      stepped by one rank, its owner, which alone stores its optimizer state
    values      of the units, gathered from their owners at the end of each step
    the rest    tensors that are in no unit: stepped by every rank alike

It is for optimizers that need several whole tensors at once, or whose work or state for one unit
is large. Owners are chosen so that the largest sum of costs is small: the most expensive unit
first, each to the rank that has least so far.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dlora.sharding.replica.flat_shards import RankRange
from dlora.sharding.replica.hierarchical_reduce import Reduction, part_of, reduction_bytes
from dlora.sharding.replica.optimizer_state import Named, ReplicaError, States
from dlora.sharding.replica.replicated_state import ReplicatedState
from dlora.sharding.replica.state_gathering import gather_ranges, kinds_by_rank
from dlora.sharding.topology import Topology


class StepUnit(NamedTuple):
    """Parameters that one rank steps together.

    Attributes:
        cost: of a step, in any measure; ranks get units of about equal cost.
    """

    parameters: tuple[nn.Parameter, ...]
    cost: float


@runtime_checkable
class InUnits(Protocol):
    """An optimizer that can leave some of its work to other ranks.

    Attributes:
        units: what one rank steps as a whole; parameters that are in none are stepped by all.
    """

    @property
    def units(self) -> Sequence[StepUnit]: ...

    def step_only(self, indices: Collection[int]) -> None:
        """Step these units from now on, and no other."""


def owners(costs: Sequence[float], ranks: int) -> list[int]:
    """The rank that gets each unit, by index; the same on every rank.

    Args:
        costs: of the units.
        ranks: how many share them.
    """
    load = [0.0] * ranks
    chosen = [0] * len(costs)
    for index in sorted(range(len(costs)), key=lambda index: -costs[index]):
        chosen[index] = min(range(ranks), key=load.__getitem__)
        load[chosen[index]] += costs[index]
    return chosen


def gathered_elements(sizes: Sequence[int], owned_by: Sequence[int], topology: Topology) -> int:
    """Elements of the tensor in which units of so many elements are gathered from their owners."""
    if topology.world == 1:
        return 0
    held = [0] * topology.world
    for size, rank in zip(sizes, owned_by, strict=True):
        held[rank] += size
    return max(held) * topology.world


def gather_bytes(nbytes: int, topology: Topology) -> float:
    """Ring-equivalent bytes that a rank sends to gather a tensor of `nbytes`."""
    return reduction_bytes(nbytes, topology) / 2


class OwnedState(ReplicatedState):
    """Gradients are whole on every rank; each rank steps the units that it owns.

    An optimizer that does not work in units steps everything on every rank, as in its base class.
    """

    def __init__(self, named: Named, reduction: Reduction) -> None:
        super().__init__(named, reduction)
        self._owner: dict[str, int] = {}  # of the tensors that are in units

    @property
    def collective_saves(self) -> bool:
        return bool(self._owner)

    def attach_optimizer(self, optimizer: Optimizer, before_step: Callable[[], None]) -> None:
        """Choose owners of its units; from now on each step ends with gathering these."""
        if not isinstance(optimizer, InUnits):
            return
        topology, units = self._reduction.topology, optimizer.units
        names = {id(parameter): name for name, parameter in self.optimized.items()}
        chosen = owners([unit.cost for unit in units], topology.world)
        for unit, rank in zip(units, chosen, strict=True):
            for parameter in unit.parameters:
                if id(parameter) not in names:
                    raise ReplicaError("the optimizer works on tensors that are not the replica's")
                self._owner[names[id(parameter)]] = rank
        sizes = [self.optimized[name].numel() for name in self._owner]
        self._length = gathered_elements(sizes, list(self._owner.values()), topology)
        optimizer.step_only([i for i, rank in enumerate(chosen) if rank == topology.rank])
        optimizer.register_step_pre_hook(lambda *_: before_step())
        optimizer.register_step_post_hook(lambda *_: self._gather())

    def local_part(self, name: str, state: Tensor) -> Tensor | None:
        rank = self._reduction.topology.rank
        return state if self._owner.get(name, rank) == rank else None

    def gather_full(
        self, states: States, *, everywhere: bool = False
    ) -> Iterator[tuple[str, str, Tensor]]:
        if not self._owner:
            yield from super().gather_full(states)
            return
        topology, gets = self._reduction.topology, everywhere or self._reduction.topology.rank == 0
        by_rank = kinds_by_rank(states, topology, self.values.device)
        for name in self.optimized:
            owner = self._owner.get(name, 0)
            for slot, kind in by_rank[owner].get(name, {}).items():
                state = torch.tensor(kind.value or 0, dtype=kind.torch_dtype)
                if kind.value is None:
                    mine = states[name][slot].reshape(-1) if topology.rank == owner else None
                    like = self.values.new_empty(0, dtype=kind.torch_dtype)
                    ranges = [RankRange(owner, 0, math.prod(kind.shape))]
                    flat = gather_ranges(mine, ranges, like, topology, everywhere=everywhere)
                    state = flat.view(kind.shape) if gets else flat
                if gets:
                    yield name, slot, state

    @torch.no_grad()
    def _gather(self) -> None:
        """Every tensor of a unit ← that of its owner."""
        topology = self._reduction.topology
        if not self._length:
            return
        flat = next(iter(self.optimized.values())).new_zeros(self._length)
        parts = flat.chunk(topology.world)
        places: dict[str, Tensor] = {}
        filled = [0] * topology.world
        for name, rank in self._owner.items():
            parameter, start = self.optimized[name], filled[rank]
            filled[rank] += parameter.numel()
            place = parts[part_of(rank, topology)][start : filled[rank]]
            places[name] = place.view(parameter.shape)
            if rank == topology.rank:
                places[name].copy_(parameter)
        self._reduction.gather_(flat)
        for name, place in places.items():
            if self._owner[name] != topology.rank:
                self.optimized[name].copy_(place)
