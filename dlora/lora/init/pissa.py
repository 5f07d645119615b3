"""PiSSA: A and B start as the principal part of W0, which is subtracted.

    W0 = U S Vᵀ;   B₀ = U_r·(S_r/s)^½,   A₀ = (S_r/s)^½·V_rᵀ,   s·B₀A₀ = the truncation to rank r

Source: Meng et al. 2024, https://arxiv.org/abs/2404.02948; with PEFT's s, so that any α works.
"""

from __future__ import annotations

from torch import Tensor

from dlora.lora.init.base import Initialisation
from dlora.lora.init.svd import triplets


class Pissa(Initialisation):
    """The r largest singular triplets of W0; r ≤ min(m, n)."""

    name = "pissa"
    needs = "weight"
    directions = 1

    @classmethod
    def factors(
        cls, matrix: Tensor, r: int, scaling: float, **settings: float
    ) -> tuple[Tensor, Tensor] | None:
        found = triplets(matrix, r)
        return found and found.balanced(scaling)
