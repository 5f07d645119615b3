"""Where an update acts: section 7 of the LoRA paper, in float64.

    ΔW [m, n] = U·S·Vᵀ          of its r largest singular values, V: directions of the input
    φ(i, j) = ‖V₁ᵢᵀ·V₂ⱼ‖² / min(i, j)     of the first i and j columns, in [0, 1]; U alike
    E[φ(i, j)] = max(i, j)/n              of random subspaces
    ‖Uᵀ·W0·V‖                             how much W0 has of what ΔW writes
    ‖ΔW‖ / ‖Uᵀ·W0·V‖                      amplification
    r·‖W0‖/√(mn)                          what random U and V leave of W0
    exp(−Σ p·ln p), p = σ/Σσ              effective rank (Roy and Vetterli 2007)

All norms are Frobenius norms. Source: https://arxiv.org/abs/2106.09685; its appendix G prints
φ = (1/p)(1 − d²), where 1 − d²/p is meant.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dlora.lora.init.svd import DEAD

_BLOCK = 1 << 20  # elements of W0 in float64 at a time


def similarity(one: Tensor, other: Tensor) -> Tensor:
    """φ [r₁, r₂] of the first i and j columns, at [i − 1, j − 1].

    Args:
        one, other: [n, r₁] and [n, r₂] with orthonormal columns, the largest direction first.
    """
    sums = (one.t() @ other).square().cumsum(0).cumsum(1)
    i, j = (torch.arange(1, size + 1, dtype=sums.dtype) for size in sums.shape)
    # Rounding may leave 1 + 1e-16.
    return (sums / torch.minimum(i[:, None], j)).clamp(max=1)


def projection(U: Tensor, W: Tensor, V: Tensor) -> float:
    """‖Uᵀ·W·V‖ of U [m, r], W [m, n] and V [n, r]; of W only blocks are in float64."""
    if not W.is_contiguous():  # its rows are apart in memory
        U, W, V = V, W.t(), U
    product = torch.zeros(U.shape[1], V.shape[1], dtype=torch.float64)
    rows = max(1, _BLOCK // W.shape[1])
    for first in range(0, W.shape[0], rows):
        block = slice(first, first + rows)
        product += U[block].t() @ (W[block].double() @ V)
    return float(product.norm())


def norm(W: Tensor) -> float:
    """‖W‖ of W [m, n], summed in float64."""
    W = W if W.is_contiguous() else W.t()
    rows = max(1, _BLOCK // W.shape[1])
    return math.sqrt(sum(float(block.double().square().sum()) for block in W.split(rows)))


def effective_rank(sigma: Tensor) -> float:
    """exp of the entropy of σ/Σσ: r of r equal values, 1 of a single one; 0 of none."""
    total = float(sigma.sum())
    if not total:
        return 0.0
    p = sigma / total
    return math.exp(-float(torch.special.xlogy(p, p).sum()))


def live(sigma: Tensor) -> int:
    """How many singular values, in descending order, are more than rounding."""
    return int((sigma > DEAD * sigma[0]).sum()) if len(sigma) else 0
