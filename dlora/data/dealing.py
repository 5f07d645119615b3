"""How a step's sequences become the micro-batches of ranks: so many sequences, or so many tokens.

The sequences of a step are the same in either case, and so is what is learned.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from dlora.data.collate import in_eights
from dlora.data.sampler import deal

Lengths = Mapping[int, int] | Sequence[int] | npt.NDArray[np.int64]
Dealt = list[list[list[int]]]  # [rank][k] are the ids of that rank's k-th micro-batch


@dataclass(frozen=True)
class Dealing:
    """How micro-batches are made.

    Attributes:
        size: sequences of one, where `tokens` is 0.
        tokens: most tokens of one, padding included; rounded up to a multiple of 8.
        packs: whether its sequences share a row.
    """

    size: int
    tokens: int = 0
    packs: bool = False

    def __call__(self, ids: Sequence[int], lengths: Lengths, world: int) -> Dealt:
        """Divides a step's sequences over ranks; every rank gets as many micro-batches.

        By tokens as few as can be, of equal work; the k-th micro-batches of all ranks are
        neighbours in work, the largest first, since ranks that gather W0 together wait for each
        other. Some may be empty: passes of weight zero.

        Raises:
            ValueError: a sequence alone has more tokens than a micro-batch may have.
        """
        if not self.tokens:
            return deal(ids, lengths, world, self.size)
        ordered = sorted(ids, key=lambda i: (-int(lengths[i]), i))
        most = in_eights(self.tokens)
        if ordered and in_eights(int(lengths[ordered[0]])) > most:
            raise ValueError(f"{lengths[ordered[0]]} tokens do not fit into {self.tokens}")
        make = _shared_rows if self.packs else _padded_rows
        bins = make(ordered, [int(lengths[i]) for i in ordered], world, most)
        return [bins[rank::world] for rank in range(world)]

    def times(self, number: int) -> Dealing:
        """Micro-batches `number` times as large."""
        return replace(self, size=self.size * number, tokens=self.tokens * number)

    def holding(self, longest: int) -> Dealing:
        """Micro-batches in which a sequence of so many tokens fits."""
        return replace(self, tokens=max(self.tokens, longest)) if self.tokens else self

    def places(self, lengths: Sequence[int]) -> int:
        """Tokens of a micro-batch with its padding."""
        if not lengths:
            return 0
        return in_eights(sum(lengths)) if self.packs else len(lengths) * in_eights(max(lengths))


def _shared_rows(ids: list[int], sizes: list[int], world: int, most: int) -> list[list[int]]:
    """Each sequence, the largest first, goes to the bin with the fewest tokens."""
    micros = max(1, -(-sum(sizes) // (world * most)))
    while True:
        bins: list[tuple[int, int, list[int]]] = [(0, k, []) for k in range(world * micros)]
        for i, size in zip(ids, sizes, strict=True):
            load, k, members = bins[0]
            if in_eights(load + size) > most:
                break
            heapq.heapreplace(bins, (load + size, k, [*members, i]))
        else:
            return [members for _, _, members in sorted(bins, key=lambda b: (-b[0], b[1]))]
        micros += 1


def _padded_rows(ids: list[int], sizes: list[int], world: int, most: int) -> list[list[int]]:
    """Neighbours in length, cut into as few runs as fit, then into equal ones of that number."""
    wanted = _rounded(len(_runs(sizes, most)), world)
    low, high = in_eights(max(sizes, default=1)), most
    while low < high:  # the least that each run may have, for as many runs
        middle = (low + high) // 2
        low, high = (low, middle) if len(_runs(sizes, middle)) <= wanted else (middle + 1, high)
    cuts = _runs(sizes, high)
    runs = [ids[start:stop] for start, stop in cuts]
    work = [(stop - start) * in_eights(sizes[start]) for start, stop in cuts]
    ordered = [runs[k] for k in sorted(range(len(runs)), key=lambda k: -work[k])]
    return ordered + [[] for _ in range(wanted - len(ordered))]


def _runs(sizes: list[int], most: int) -> list[tuple[int, int]]:
    """(start, stop) of runs, greedily, of descending sizes; the first of a run is its longest."""
    cuts, start = [], 0
    while start < len(sizes):
        count = max(1, most // in_eights(sizes[start]))
        cuts.append((start, min(start + count, len(sizes))))
        start += count
    return cuts


def _rounded(runs: int, world: int) -> int:
    return max(1, -(-runs // world)) * world
