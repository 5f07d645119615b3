"""torch's SGD, without momentum."""

from __future__ import annotations

from typing import Any

import torch

from dlora.optim.rule import Groups


class Sgd:
    """The rule `sgd`: no state."""

    name = "sgd"
    moments = 0
    divides = "elements"

    @staticmethod
    def build(groups: Groups, *_: Any) -> torch.optim.Optimizer:
        """`torch.optim.SGD`."""
        return torch.optim.SGD(groups)
