"""Flat tensors in equal parts, one for each rank: who has what, and a whole made of parts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from dlora.errors import UsageError
from dlora.sharding.replica.hierarchical_reduce import divisible, owner
from dlora.sharding.replica.optimizer_state import Named, ReplicaError, States, count
from dlora.sharding.topology import Topology


class Span(NamedTuple):
    """Elements [start, stop) of a flattened tensor, and the rank that has them."""

    rank: int
    start: int
    stop: int


class Parts:
    """Tensors that are laid end to end, padded, and divided into one part for each rank.

    Attributes:
        size: elements of a part.
    """

    def __init__(self, named: Named, topology: Topology) -> None:
        self.topology = topology
        self.size = divisible(count(named), topology) // topology.world
        self._spans: dict[str, list[Span]] = {}
        start = 0
        for name, parameter in named.items():
            stop = start + parameter.numel()
            self._spans[name] = [  # none of a tensor without elements
                Span(
                    owner(part, topology),
                    max(part * self.size, start) - start,
                    min((part + 1) * self.size, stop) - start,
                )
                for part in range(start // self.size, -(-stop // self.size))
                if stop > start
            ]
            start = stop

    def spans(self, name: str) -> list[Span]:
        """Who has what of a tensor, in the order of its elements."""
        return self._spans[name]

    def here(self, name: str) -> Span:
        """What this rank has of a tensor; start and stop are equal where it has none of it."""
        rank = self.topology.rank
        return next((span for span in self._spans[name] if span.rank == rank), Span(rank, 0, 0))


def gathered(
    parts: Parts, named: Named, states: States, *, everywhere: bool = False
) -> Iterator[tuple[str, str, Tensor]]:
    """(name, slot, whole tensor) of what ranks keep of their parts, one after the other.

    Collective until it is exhausted. Unless they are wanted `everywhere` rank 0 alone gets them,
    and holds one whole tensor at a time, the others none: each sends what it has. States without
    dims, such as a count of steps, are those of a tensor's first part.

    Args:
        named: the tensors, whole.
        states: of this rank's parts, flat.

    Raises:
        UsageError: on every rank: a state is not one number for each element.
        ReplicaError: on every rank: ranks keep different states of one tensor.
    """
    gets = everywhere or parts.topology.rank == 0
    for name, slots in _agreed(parts, named, states).items():
        for slot, (dtype_name, scalar) in slots.items():
            dtype = getattr(torch, dtype_name)
            if scalar is None:
                here = parts.here(name)
                mine = states[name][slot] if here.stop > here.start else None
                like = named[name].detach().new_empty(0, dtype=dtype)
                bring = _everywhere if everywhere else _on_rank_0
                whole = bring(parts, name, mine, like)
                if gets:
                    yield name, slot, whole.view(named[name].shape)
            elif gets:
                yield name, slot, torch.tensor(scalar, dtype=dtype)


def _everywhere(parts: Parts, name: str, mine: Tensor | None, like: Tensor) -> Tensor:
    """The whole of a flat tensor on every rank: each part goes out from the rank that has it."""
    spans = parts.spans(name)
    whole = like.new_empty(spans[-1].stop if spans else 0)
    if mine is not None:
        here = parts.here(name)
        whole[here.start : here.stop] = mine
    for span in spans if parts.topology.world > 1 else ():
        dist.broadcast(whole[span.start : span.stop], src=span.rank)
    return whole


def _on_rank_0(parts: Parts, name: str, mine: Tensor | None, like: Tensor) -> Tensor:
    """The whole of a flat tensor on rank 0, of the dtype and on the device of `like`."""
    spans, rank = parts.spans(name), parts.topology.rank
    if rank != 0:
        if mine is not None:
            done([dist.P2POp(dist.isend, mine, 0)])
        return like
    whole = like.new_empty(spans[-1].stop if spans else 0)
    if mine is not None:
        here = parts.here(name)
        whole[here.start : here.stop] = mine
    done([dist.P2POp(dist.irecv, whole[s.start : s.stop], s.rank) for s in spans if s.rank])
    return whole


def done(operations: list[dist.P2POp]) -> None:
    """Start them together, and wait for all."""
    if operations:
        for work in dist.batch_isend_irecv(operations):
            work.wait()


# -- what there is to be gathered --------------------------------------------------------------

# name → slot → [dtype, None], or [dtype, value] of a state without dims, or [dtype, [shape]] of one
# that does not have the part's shape.
Described = dict[str, dict[str, list[Any]]]


def _agreed(parts: Parts, named: Named, states: States) -> Described:
    """What all ranks have, in the order of the tensors, once it is clear that they agree."""
    device = next(iter(named.values())).device
    mine = json.dumps(_described(parts, states))
    by_rank: list[Described] = [json.loads(text) for text in texts(mine, parts.topology, device)]
    agreed: Described = {}
    for name in named:
        ranks = [span.rank for span in parts.spans(name)]
        slots = by_rank[ranks[0]].get(name, {}) if ranks else {}
        for rank in ranks[1:]:
            if by_rank[rank].get(name, {}) != slots:
                raise ReplicaError(
                    f"ranks {ranks[0]} and {rank} keep different optimizer states of {name}: "
                    f"{slots} and {by_rank[rank].get(name, {})}"
                )
        for slot, (_, known) in slots.items():
            if isinstance(known, list):
                raise UsageError(
                    "sharding.optimizer_state: divided needs an optimizer that treats each element "
                    f"alone; this one keeps {slot} of shape {known} for {name}"
                )
        agreed[name] = slots
    return agreed


def _described(parts: Parts, states: States) -> Described:
    found: Described = {}
    for name, slots in states.items():
        here = parts.here(name)
        for slot, state in slots.items() if here.stop > here.start else ():
            known: Any = state.item() if state.ndim == 0 else list(state.shape)
            is_part = list(state.shape) == [here.stop - here.start]
            dtype = str(state.dtype).removeprefix("torch.")
            found.setdefault(name, {})[slot] = [dtype, None if is_part else known]
    return found


def texts(text: str, topology: Topology, device: torch.device) -> list[str]:
    """Every rank's text, by rank."""
    if topology.world == 1:
        return [text]
    content = text.encode()
    lengths = torch.zeros(topology.world, dtype=torch.int64, device=device)
    dist.all_gather_single(lengths, torch.tensor([len(content)], device=device))
    longest = int(lengths.max())
    mine = torch.frombuffer(bytearray(content.ljust(longest)), dtype=torch.uint8).to(device)
    every = mine.new_empty(topology.world * longest)
    dist.all_gather_single(every, mine)
    return [bytes(row.tolist()).decode() for row in every.view(topology.world, longest)]
