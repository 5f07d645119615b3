"""A part of a batch that several adapters share, whose loss is wanted apart."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class LossPart:
    """A part of a batch whose loss is wanted apart.

    Attributes:
        positions: [N, 2], the (row, token) of its targets.
        own: the same places in a batch of this part alone.
        end: in a row that all share, where its tokens end.
        head: entered around each product of the head, with the places `own` of its rows.
    """

    positions: Tensor
    own: Tensor
    end: int
    head: Callable[[Tensor], AbstractContextManager[None]]
