"""What a loss of another kind gets of a forward pass: the head, its input and the targets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from dlora.errors import UsageError
from dlora.objectives.chunked_loss import IGNORED, Criterion, target_loss
from dlora.objectives.objective import Batch
from dlora.objectives.output_head import OutputHead


@dataclass(frozen=True)
class HeadInput:
    """What `at_head` hands on, while the head's weight is gathered.

    Attributes:
        hidden: [rows, tokens, H], the input of the head.
        targets, positions, device: as of `target_loss`.
    """

    head: OutputHead
    hidden: Tensor
    targets: Tensor
    positions: Tensor
    device: str | None

    def rows(self) -> Tensor:
        """[N, H], those of `hidden` with a target."""
        return self.hidden[tuple(self.positions.T)]

    def logits(self, rows: Tensor) -> Tensor:
        """[n, V] of some of the rows [n, H]."""
        module, finish = self.head.module, self.head.finish
        assert finish is not None
        return finish(type(module).forward(module, rows))

    def loss(self, criterion: Criterion) -> Tensor:
        """Σ `criterion` over the positions with a target."""
        where = (self.hidden, self.targets, self.positions, self.device)
        return target_loss(self.head, *where, criterion=criterion)


def at_head(model: nn.Module, batch: Batch, take: Callable[[HeadInput], Tensor]) -> Tensor:
    """A forward pass of a model with `chunked_loss` installed: what `take` makes at its head.

    Raises:
        UsageError: the class of the model computes its logits whole.
    """
    targets = batch.targets
    known: Tensor | None = batch.positions
    positions = (targets != IGNORED).nonzero() if known is None else known

    def wanted(head: OutputHead, hidden: Tensor, device: str | None) -> Tensor:
        if head.finish is None:
            raise UsageError("model.path: the logits of its class are not known row by row")
        return take(HeadInput(head, hidden, targets, positions, device))

    where = {"positions": positions, "lengths": batch.lengths}
    found: Tensor = model(**batch.inputs, targets=targets, wanted=wanted, **where)
    return found
