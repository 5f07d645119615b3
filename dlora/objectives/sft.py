"""Supervised fine-tuning: Σ −log p(target) over the target tokens."""

from __future__ import annotations

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
