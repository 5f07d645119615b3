"""AdaLoRA's regulariser: P and Q stay close to orthonormal, so that λ measures a triplet's size.

    R = mean over all P and Q of N,    N(Q) = ‖QQᵀ − I‖_F,    N(P) = ‖PᵀP − I‖_F
    ∂N/∂Q = 2·(QQᵀ − I)·Q / N,    ∂N/∂P = 2·P·(PᵀP − I) / N,    0 where N = 0

The norms are not squared: so it is in both public codes, for which the usual weights were found.

Source: Zhang et al. 2023, https://arxiv.org/abs/2303.10512, equation 4, and its code.
"""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def add_gradient(factor: Tensor, dim: int, gradient: Tensor, weight: float) -> Tensor:
    """gradient += weight·∂N/∂factor, in place; returns N, a scalar.

    Args:
        factor: Q [r, n] with dim 0, or P [m, r] with dim 1: `dim` counts triplets.
    """
    gram = torch.mm(factor, factor.t()) if dim == 0 else torch.mm(factor.t(), factor)
    gram.diagonal().sub_(1.0)
    norm = torch.linalg.matrix_norm(gram)
    if weight:
        # The smallest normal number in place of 0: the numerator is 0 then as well.
        gram.div_(norm.clamp(min=torch.finfo(norm.dtype).tiny))
        first, second = (gram, factor) if dim == 0 else (factor, gram)
        gradient.addmm_(first, second, alpha=2 * weight)
    return norm
