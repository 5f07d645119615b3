"""A and B both random with B·A = 0, as PEFT's `init_lora_weights="orthogonal"`.

    Q [r, r] orthogonal;  A = (X Q_odd)ᵀ/10,  B = Y Q_even/10,  X [n, r/2], Y [m, r/2] ~ N(0, 1)

Rows of Q are orthogonal to each other, so B·A = Y (Q_even Q_oddᵀ) Xᵀ/100 = 0, and unlike with B = 0
both factors have a gradient in the first step.

Source: https://datta0.github.io/posts/rethink-lora-init, as in PEFT's `LoraLayer.orthogonal_init`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dlora.lora.init.base import Initialisation


class Orthogonal(Initialisation):
    """A and B from disjoint rows of one orthogonal matrix; r must be even."""

    name = "orthogonal"

    @classmethod
    def check(cls, r: int) -> str | None:
        return None if r % 2 == 0 else f"orthogonal needs an even LoRA rank, got {r}"

    @classmethod
    @torch.no_grad()
    def draw(cls, A: Tensor, B: Tensor, *, is_embedding: bool) -> None:
        if A.is_meta:
            return
        r, where = A.shape[0], {"dtype": torch.float64, "device": A.device}
        rows = torch.linalg.qr(torch.randn(r, r, **where)).Q  # type: ignore[call-overload]
        x = torch.randn(A.shape[1], r // 2, **where)  # type: ignore[call-overload]
        y = torch.randn(B.shape[0], r // 2, **where)  # type: ignore[call-overload]
        A.copy_((x @ rows[0::2]).t() / 10)
        B.copy_(y @ rows[1::2] / 10)
