"""Supervised fine-tuning: Σ −log p(target) over the target tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from dlora.objectives.objective import Batch


class Sft:
    """Cross entropy, in chunks (`dlora.objectives.chunked_loss`)."""

    name = "sft"

    def __init__(self, section: Any) -> None:
        """Take `None`: there are no options."""

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        where = {"positions": batch.positions, "lengths": batch.lengths}
        return model(**batch.inputs, targets=batch.targets, **where)

    def loss_of_parts(self, model: nn.Module, batch: Batch, parts: Sequence[Any]) -> Tensor:
        """[parts], the sum of each part of a batch that several adapters share."""
        where = {"positions": batch.positions, "lengths": batch.lengths}
        return model(**batch.inputs, targets=batch.targets, parts=parts, **where)
