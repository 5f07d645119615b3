"""An optimizer's work spread over ranks in units: tensors that have to be stepped together.

    gradients   whole on every rank            (as where everything is replicated)
    a unit      stepped by one rank, its owner, which alone keeps the state of it
    values      of the units, gathered from their owners at the end of each step
    the rest    tensors that are in no unit: stepped by every rank alike

It is for optimizers that look at several whole tensors at once, or whose work or state for one unit
is large. Owners are chosen so that the largest sum of costs is small: the dearest unit first, each
to the rank that has least so far.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from dlora.sharding.replica.flat_shards import done, texts
from dlora.sharding.replica.hierarchical_reduce import Reduction, part_of, reduction_bytes
from dlora.sharding.replica.optimizer_state import Named, ReplicaError, ReplicatedState, States
from dlora.sharding.topology import Topology


class Unit(NamedTuple):
    """Parameters that one rank steps together, and what that costs, in any unit of measure."""

    parameters: tuple[nn.Parameter, ...]
    cost: float


@runtime_checkable
class InUnits(Protocol):
    """An optimizer that can leave some of its work to other ranks.

    Attributes:
        units: what cannot be divided; parameters that are in none are not spread.
    """

    @property
    def units(self) -> Sequence[Unit]: ...

    def keep(self, indices: Collection[int]) -> None:
        """Step these units from now on, and no other."""


def owners(costs: Sequence[float], ranks: int) -> list[int]:
    """The rank that gets each unit; the same wherever it is asked."""
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


class SpreadShare(ReplicatedState):
    """Gradients are whole on every rank; each rank steps the units that it owns."""

    collective_saves = True

    def __init__(self, named: Named, reduction: Reduction) -> None:
        super().__init__(named, reduction)
        self._owner: dict[str, int] = {}

    def drive(self, optimizer: Optimizer, before_step: Callable[[], None]) -> None:
        """Choose owners; from now on each step ends with gathering what they stepped."""
        assert isinstance(optimizer, InUnits)
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
        optimizer.keep([i for i, rank in enumerate(chosen) if rank == topology.rank])
        optimizer.register_step_pre_hook(lambda *_: before_step())
        optimizer.register_step_post_hook(lambda *_: self._gather())

    def part(self, name: str, state: Tensor) -> Tensor | None:
        rank = self._reduction.topology.rank
        return state if self._owner.get(name, rank) == rank else None

    def whole(
        self, states: States, *, everywhere: bool = False
    ) -> Iterator[tuple[str, str, Tensor]]:
        """States without dims, such as a count of steps, go with the description of the others."""
        topology = self._reduction.topology
        device = next(iter(self.optimized.values())).device
        mine = json.dumps({name: _described(slots) for name, slots in states.items()})
        by_rank = [json.loads(text) for text in texts(mine, topology, device)]
        bring = _on_every_rank if everywhere else _on_rank_0
        for name in self.optimized:
            owner = self._owner.get(name, 0)
            for slot, (dtype, shape, value) in by_rank[owner].get(name, {}).items():
                if value is not None:
                    state = torch.tensor(value, dtype=getattr(torch, dtype))
                elif topology.rank == owner:
                    state = states[name][slot].contiguous()
                else:
                    state = torch.empty(shape, dtype=getattr(torch, dtype), device=device)
                if value is None and topology.world > 1:
                    bring(state, owner, topology)
                if everywhere or topology.rank == 0:
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


def _on_every_rank(state: Tensor, owner: int, topology: Topology) -> None:
    dist.broadcast(state, src=owner)


def _on_rank_0(state: Tensor, owner: int, topology: Topology) -> None:
    if owner == 0:
        return
    if topology.rank == owner:
        done([dist.P2POp(dist.isend, state, 0)])
    elif topology.rank == 0:
        done([dist.P2POp(dist.irecv, state, owner)])


def _described(slots: Mapping[str, Tensor]) -> dict[str, list[Any]]:
    """slot → [dtype, shape, value of what has no dims]."""
    return {
        slot: [
            str(state.dtype).removeprefix("torch."),
            list(state.shape),
            None if state.ndim else state.item(),
        ]
        for slot, state in slots.items()
    }
