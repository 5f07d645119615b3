"""LoRA-GA: the first steps of A and B move W as full fine-tuning would.

    G = ∂L/∂W0 = U S Vᵀ [m, n]
    A₀ = (m^¼/√γ)·V_{:r}ᵀ,   B₀ = (m^¼/√γ)·U_{:, r:2r}
    B₀B₀ᵀG + G·A₀ᵀA₀ = (√m/γ)·(G truncated to rank 2r)

which is the direction of LoRA's first step, and no A and B of rank r have a nearer one. Only the
directions of G count, never its size. m is the number of outputs for both factors; a larger γ is a
smaller start. (PEFT's `lora_ga` multiplies B by S and scales B alone: there this does not hold.)

Source: Wang, Yu, Li 2024, https://arxiv.org/abs/2407.05000, theorem 3.1, with the "ArB2r"
directions and the "stable" scale of its code.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from dlora.lora.init.base import Initialisation
from dlora.lora.init.svd import triplets
from dlora.registry import option


@dataclass(frozen=True)
class LoraGAOptions:
    """γ, and what the gradient is estimated on."""

    lora_ga_gamma: float = option(16.0, "a larger gamma makes A and B start smaller", gt=0)
    lora_ga_batches: int = option(
        2, "number of first steps whose sequences the gradient is estimated on", ge=1
    )


class LoraGA(Initialisation):
    """Directions of the gradient of W0; 2r ≤ min(m, n)."""

    name = "lora_ga"
    needs = "gradient"
    directions = 2
    options = LoraGAOptions

    @classmethod
    def factors(
        cls, matrix: Tensor, r: int, scaling: float, **settings: float
    ) -> tuple[Tensor, Tensor] | None:
        found = triplets(matrix, 2 * r)
        if found is None:
            return None
        size = matrix.shape[0] ** 0.25 / settings["lora_ga_gamma"] ** 0.5
        return size * found.V[:, :r].t(), size * found.U[:, r:]
