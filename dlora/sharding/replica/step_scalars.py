"""Scalars that are reduced with the gradients of a step, packed into a list of floats to be summed.

    [ tokens | scalars | integer of rank 0 | integer of rank 1 | … ]

float32 has exact integers up to 2^24, so an integer is sent as two limbs: `tokens`, whose limbs are
added up over ranks, in base 2^12 (exact below 2^36), and the integers of ranks, which only their
own rank writes, in base 2^24 (exact below 2^48: bytes of memory, say).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, tensor

Scalar = float | Tensor  # a tensor stays where it is, so that nobody waits for a GPU

MOST_SCALARS = 16
_SUMMED_LIMB, _OWN_LIMB = 1 << 12, 1 << 24


@dataclass(frozen=True)
class Reduced:
    """The scalars that were reduced with the gradients of one step; the same on every rank.

    Attributes:
        tokens: Σ tokens over ranks; the number of ranks where none were given.
        scalars: Σ over ranks of each scalar, by name.
        each: the integer of each rank, by rank.
        norm: 2-norm of the reduced gradients, as `Replica.gradient_norm`.
    """

    tokens: int
    scalars: dict[str, float]
    each: list[int]
    norm: float = 0.0


def tail_length(world: int) -> int:
    """Number of floats."""
    return 2 + MOST_SCALARS + 2 * world


def pack_tail(
    tokens: int, scalars: Mapping[str, Scalar], each: int, rank: int, world: int
) -> list[Scalar]:
    """One rank's addend, of `tail_length`; every rank must name the same scalars in one order."""
    tail: list[Scalar] = [0.0] * tail_length(world)
    tail[:2] = divmod(tokens, _SUMMED_LIMB)
    tail[2 : 2 + len(scalars)] = scalars.values()
    own = 2 + MOST_SCALARS + 2 * rank
    tail[own : own + 2] = divmod(each, _OWN_LIMB)
    return tail


def fill_(out: Tensor, scalars: Sequence[Scalar]) -> None:
    """out [len(scalars)] ← scalars, by one copy to its device, which the host does not wait for."""
    host = tensor([0.0 if isinstance(s, Tensor) else s for s in scalars], dtype=out.dtype)
    out.copy_(host.pin_memory() if out.is_cuda else host, non_blocking=True)
    for place, scalar in enumerate(scalars):
        if isinstance(scalar, Tensor):
            out[place].copy_(scalar)


def unpack_tail(total: Sequence[float], names: Sequence[str], world: int) -> Reduced:
    """The scalars from the sum over ranks; `names` are those given to `pack_tail`."""
    ranks = total[2 + MOST_SCALARS :]
    return Reduced(
        tokens=_joined(total[:2], _SUMMED_LIMB),
        scalars=dict(zip(names, total[2:], strict=False)),
        each=[_joined(ranks[2 * rank : 2 * rank + 2], _OWN_LIMB) for rank in range(world)],
    )


def _joined(limbs: Sequence[float], base: int) -> int:
    return round(limbs[0]) * base + round(limbs[1])
