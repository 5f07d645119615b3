"""MiLoRA: A and B start as the minor part of W0, which is subtracted.

    W0 = U S Vᵀ;   B₀ = U_{−r:}·(S_{−r:}/s)^½,   A₀ = (S_{−r:}/s)^½·V_{−r:}ᵀ

of the economy decomposition, with min(m, n) triplets. Where W0 lacks rank the last ones are zero,
and A₀ = B₀ = 0 would never get a gradient: such a layer stays as it was drawn.

Source: Wang et al. 2024, https://arxiv.org/abs/2406.09044.
"""

from __future__ import annotations

from torch import Tensor

from dlora.lora.init.base import Initialisation
from dlora.lora.init.svd import triplets


class Milora(Initialisation):
    """The r smallest singular triplets of W0; r ≤ min(m, n)."""

    name = "milora"
    needs = "weight"
    directions = 1

    @classmethod
    def factors(
        cls, matrix: Tensor, r: int, scaling: float, **settings: float
    ) -> tuple[Tensor, Tensor] | None:
        found = triplets(matrix, r, smallest=True)
        return found and found.balanced(scaling)
