"""LoRA-Pro: updates of A and B that move W as nearly as they can like its own gradient would.

    W = W0 + s·B·A     W [m, n], A [r, n], B [m, r]
    G = ∂L/∂W          is never formed: it is seen as  g_A = s·BᵀG [r, n]  and  g_B = s·G·Aᵀ [m, r]
    h_A, h_B           A − η·h_A and B − η·h_B move W by −η·g̃ + O(η²),  g̃ = s(B·h_A + h_B·A)

    h_A = (BᵀB)⁻¹ g_A / s² + X·A
    h_B = (1 − P_B) g_B (AAᵀ)⁻¹ / s² − B·X            P_B = B (BᵀB)⁻¹ Bᵀ,  P_A = Aᵀ (AAᵀ)⁻¹ A

minimise ‖g̃ − G‖ for every X [r, r]; what is left is (1 − P_B)·G·(1 − P_A). Of all X, the solution
of BᵀB·X + X·AAᵀ = −(BᵀB)⁻¹ g_A Aᵀ / s² leaves h_A and h_B nearest to g_A and g_B. Whatever X is,
⟨g_A, h_A⟩ + ⟨g_B, h_B⟩ = ⟨G, g̃⟩ = ‖g̃‖² ≥ 0.

Where B or A is zero, as at the start, its inverse is taken as zero: what is left of the formulas is
their limit. Eigenvalues of BᵀB and AAᵀ below `CLAMP` of the largest are taken for that.

Source: Wang et al. 2025, LoRA-Pro, https://arxiv.org/abs/2407.18242, theorems 2.1 to 2.3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Of squared singular values. A pass in bf16 knows a direction of B only if its singular value is
# above some 1e-3 of the largest; dividing its part in others by theirs would amplify noise.
CLAMP = 1e-6


@dataclass(frozen=True)
class Gram:
    """M = Q diag(values) Qᵀ [r, r], symmetric and not negative, and M⁻¹ = Q diag(inverses) Qᵀ."""

    values: Tensor
    inverses: Tensor
    Q: Tensor

    def solve(self, right: Tensor) -> Tensor:
        """M⁻¹·right, for [r, k]."""
        return self.Q @ (self.inverses[:, None] * (self.Q.t() @ right))


def grams(matrices: Sequence[Tensor]) -> list[Gram]:
    """F·Fᵀ of each F [r, k], in float64; those of equal r are factorised in one call."""
    found: dict[int, Gram] = {}
    by_size: dict[int, list[int]] = {}
    for index, matrix in enumerate(matrices):
        by_size.setdefault(matrix.shape[0], []).append(index)
    for indices in by_size.values():
        stack = torch.stack([_gram(matrices[i]) for i in indices])
        values, Q = torch.linalg.eigh(stack.nan_to_num(0, 0, 0))  # a pair that is lost stays so
        values = values.clamp(min=CLAMP * values[:, -1:]).clamp(min=0)
        inverses = torch.where(values > 0, 1 / values, 0)
        found |= {i: Gram(*parts) for i, *parts in zip(indices, values, inverses, Q, strict=True)}
    return [found[index] for index in range(len(matrices))]


class Frame:
    """A pair A, B with its scale s; everything in it is computed in float64.

    Args:
        A, B: [r, n] and [m, r].
        of_A, of_B: `grams` of A and of Bᵀ.
    """

    def __init__(self, A: Tensor, B: Tensor, scaling: float, of_A: Gram, of_B: Gram) -> None:
        self.A, self.B, self.s = A.double(), B.double(), scaling
        self.of_A, self.of_B = of_A, of_B

    def nearest(self, g_A: Tensor, g_B: Tensor) -> tuple[Tensor, Tensor]:
        """h_A and h_B with X = 0."""
        h_A = self.of_B.solve(g_A.double()) / self.s**2
        right = self.of_A.solve(g_B.double().t()).t() / self.s**2
        return h_A, right - self.B @ self.of_B.solve(self.B.t() @ right)

    def balanced(self, g_A: Tensor, g_B: Tensor) -> tuple[Tensor, Tensor]:
        """h_A and h_B with the X that changes g_A and g_B least."""
        h_A, h_B = self.nearest(g_A, g_B)
        X = self._sylvester(-h_A @ self.A.t())
        return h_A + X @ self.A, h_B - self.B @ X

    def _sylvester(self, right: Tensor) -> Tensor:
        """X of BᵀB·X + X·AAᵀ = right."""
        P, Q = self.of_B.Q, self.of_A.Q
        sums = self.of_B.values[:, None] + self.of_A.values[None, :]
        inner = P.t() @ right @ Q
        return P @ torch.where(sums > 0, inner / sums, 0) @ Q.t()


def equivalent(A: Tensor, B: Tensor, h_A: Tensor, h_B: Tensor, scaling: float) -> Tensor:
    """g̃ = s(B·h_A + h_B·A) [m, n]."""
    return torch.addmm(B @ h_A, h_B, A).mul_(scaling)


def seen(A: Tensor, B: Tensor, G: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """g_A = s·BᵀG and g_B = s·G·Aᵀ: what A and B see of a gradient G [m, n] of W."""
    return (B.t() @ G).mul_(scaling), (G @ A.t()).mul_(scaling)


def _gram(matrix: Tensor) -> Tensor:
    wide = matrix.double()
    return wide @ wide.t()
