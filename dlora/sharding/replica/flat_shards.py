"""Arithmetic of flat tensors in equal parts, one for each rank: which rank stores what."""

from __future__ import annotations

from typing import NamedTuple

from dlora.sharding.replica.hierarchical_reduce import divisible, owner
from dlora.sharding.replica.optimizer_state import Named, count
from dlora.sharding.topology import Topology


class RankRange(NamedTuple):
    """Elements [start, stop) of a flattened tensor, and the rank that stores them."""

    rank: int
    start: int
    stop: int


class FlatShards:
    """Tensors laid end to end, padded, and divided into one part for each rank.

    Attributes:
        size: elements of a part.
    """

    def __init__(self, named: Named, topology: Topology) -> None:
        self._rank = topology.rank
        self.size = divisible(count(named), topology) // topology.world
        self._ranges: dict[str, list[RankRange]] = {}
        start = 0
        for name, parameter in named.items():
            stop = start + parameter.numel()
            self._ranges[name] = [  # empty for a tensor without elements
                RankRange(
                    owner(part, topology),
                    max(part * self.size, start) - start,
                    min((part + 1) * self.size, stop) - start,
                )
                for part in range(start // self.size, -(-stop // self.size))
                if stop > start
            ]
            start = stop

    def ranges(self, name: str) -> list[RankRange]:
        """Which rank stores what of a tensor, in the order of its elements."""
        return self._ranges[name]

    def local(self, name: str) -> RankRange:
        """What this rank stores of a tensor; start and stop are equal where it has none of it."""
        own = (range_ for range_ in self._ranges[name] if range_.rank == self._rank)
        return next(own, RankRange(self._rank, 0, 0))
