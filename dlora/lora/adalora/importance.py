"""Which triplets matter: AdaLoRA's scores, from weights and their gradients.

For each weight w with gradient g of the loss (the global mean, regulariser included), after the
step that moved w:

    I = |w·g|                                           sensitivity
    Ī ← β₁ Ī + (1 − β₁) I                               its average, from 0
    Ū ← β₂ Ū + (1 − β₂) |I − Ī|                         uncertainty, with the new Ī
    s(w) = Ī·Ū
    S_i = s(λ_i) + mean_j s(P_ji) + mean_j s(Q_ij)      score of triplet i

The means make scores of wide and narrow matrices comparable. The alternatives of the paper's table
4 are s(w) = I of the step alone, and S_i = |λ_i|.

Source: Zhang et al. 2023, https://arxiv.org/abs/2303.10512, section 3.2. The order (w after the
step, g from before it) is that of the authors' code: with w from before the step a pruned λ = 0
would have I = 0 and could not come back.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

# By name: the averages that are kept of each weight; their names are PEFT's.
IMPORTANCES: Mapping[str, tuple[str, ...]] = {
    "uncertainty": ("exp_avg_ipt", "exp_avg_unc"),
    "sensitivity": ("exp_avg_ipt",),
    "magnitude": (),
}
_CHUNK = 1 << 20  # elements: what is computed in between stays small, and in a CPU's cache


@torch.no_grad()
def follow(
    w: Tensor,
    g: Tensor,
    sensitivity: Tensor,
    uncertainty: Tensor | None = None,
    *,
    beta1: float,
    beta2: float,
) -> None:
    """Update the averages of a step in place; all are flat and of one length.

    Args:
        sensitivity, uncertainty: Ī and Ū; without Ū, Ī becomes I itself.
    """
    for chunk in range(0, len(w), _CHUNK):
        here = slice(chunk, chunk + _CHUNK)
        product = (w[here] * g[here]).abs_()
        if uncertainty is None:
            sensitivity[here] = product
            continue
        average = sensitivity[here].lerp_(product, 1 - beta1)
        uncertainty[here].lerp_(product.sub_(average).abs_(), 1 - beta2)


def element_scores(sensitivity: Tensor, uncertainty: Tensor | None = None) -> Tensor:
    """s(w) of flat averages."""
    return sensitivity if uncertainty is None else sensitivity * uncertainty


def triplet_means(scores: Tensor, dim: int) -> Tensor:
    """Σ over a tensor's entries of one triplet, divided by their number: [r].

    Args:
        scores: s(w) of a whole P, λ or Q, with zeros for entries that are counted elsewhere.
        dim: the dim that counts triplets.
    """
    return scores.mean(1 - dim)
