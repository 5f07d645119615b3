"""Scalars that travel with the gradients of a step, as a list of floats to be summed over ranks.

    [ tokens | sums | each of rank 0 | each of rank 1 | … ]

Integers travel as two limbs, so that their sums are exact in float32 too: below 2^36.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

SUMS = 16  # scalars that may travel with the gradients
_LIMB = 4096


@dataclass(frozen=True)
class Reduced:
    """What travelled with the gradients of one step; the same on every rank.

    Attributes:
        tokens: Σ tokens over ranks; the number of ranks where none were given.
        sums: Σ over ranks of the scalars given.
        each: by rank, the integer that it gave.
    """

    tokens: int
    sums: list[float]
    each: list[int]


def tail_length(world: int) -> int:
    """Number of floats."""
    return 2 + SUMS + 2 * world


def tail(tokens: int, sums: Sequence[float], each: int, rank: int, world: int) -> list[float]:
    """One rank's addend."""
    scalars = [0.0] * tail_length(world)
    scalars[:2] = divmod(tokens, _LIMB)
    scalars[2 : 2 + len(sums)] = sums
    scalars[2 + SUMS + 2 * rank : 4 + SUMS + 2 * rank] = divmod(each, _LIMB)
    return scalars


def read_tail(total: Sequence[float], sums: int, world: int) -> Reduced:
    """What the sum over ranks says; `sums` is the number of scalars that were given."""
    ranks = total[2 + SUMS :]
    return Reduced(
        tokens=_joined(total[:2]),
        sums=list(total[2 : 2 + sums]),
        each=[_joined(ranks[2 * rank : 2 * rank + 2]) for rank in range(world)],
    )


def _joined(limbs: Sequence[float]) -> int:
    return round(limbs[0]) * _LIMB + round(limbs[1])
