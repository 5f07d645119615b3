"""A part of a batch that several adapters share, whose loss is wanted apart."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

from torch import Tensor

from dlora.objectives.chunked_loss import loss_of_logits, target_loss
from dlora.objectives.output_head import OutputHead


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

    def loss(self, head: OutputHead, hidden: Tensor, targets: Tensor, device: str | None) -> Tensor:
        """Its `target_loss`."""
        where = (hidden, targets, self.positions, device)
        return target_loss(head, *where, inside=self.head, places=self.own)

    def loss_of_logits(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Its `loss_of_logits`."""
        return loss_of_logits(logits, targets, self.positions)
