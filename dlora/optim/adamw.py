"""torch's AdamW, fused."""

from __future__ import annotations

from typing import Any

import torch

from dlora.optim.rule import Groups


class AdamW:
    """The rule `adamw`: two moments of each element."""

    name = "adamw"
    moments = 2
    divides = "elements"

    @staticmethod
    def build(groups: Groups, *_: Any) -> torch.optim.Optimizer:
        """`torch.optim.AdamW`."""
        return torch.optim.AdamW(groups, fused=True)
