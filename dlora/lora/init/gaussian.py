"""A ~ N(0, 1/r²) and B = 0, as PEFT's `init_lora_weights="gaussian"`.

Source: PEFT's `LoraLayer.reset_lora_parameters`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dlora.lora.init.base import Initialisation


class Gaussian(Initialisation):
    """A ~ N(0, 1/r²), B = 0. An embedding starts as usual: A = 0, B ~ N(0, 1)."""

    name = "gaussian"

    @classmethod
    @torch.no_grad()
    def draw(cls, A: Tensor, B: Tensor, *, is_embedding: bool) -> None:
        super().draw(A, B, is_embedding=is_embedding)
        if not is_embedding:
            A.normal_(std=1 / A.shape[0])
