"""A few singular triplets of a matrix, exact, without a decomposition of all of it.

    M [p, q] = U S Vᵀ,  p ≤ q        the matrix, or its transpose where that is the wide one
    M·Mᵀ     = U S² Uᵀ  [p, p]       eigenvectors in float64, summed over blocks of columns
    Y        = Mᵀ·U_k   [q, k]       S_k = the norms of its columns, V_k = Y/S_k

Squaring costs half of the digits of small singular values: in float64 there are enough left down to
1e-8·‖M‖, and below `DEAD`·‖M‖ a triplet is taken for zero. A block of columns is the only copy of
the matrix that is ever made.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

DEAD = 1e-6  # of the largest singular value: factors made of less would never get a gradient
_BLOCK = 1 << 20  # elements
_STRIPS = 4  # five eighths of the products of a whole square


class Triplets(NamedTuple):
    """M ≈ U·diag(S)·Vᵀ with U [m, k], S [k], V [n, k], the largest first, in float64."""

    U: Tensor
    S: Tensor
    V: Tensor

    def balanced(self, scaling: float) -> tuple[Tensor, Tensor]:
        """(A [k, n], B [m, k]) with s·B·A = U·diag(S)·Vᵀ: B = U·(S/s)^½, A = (S/s)^½·Vᵀ."""
        root = (self.S / scaling).sqrt()
        return root[:, None] * self.V.t(), self.U * root


class Spectrum(NamedTuple):
    """All singular values of a matrix [m, n], and what its triplets are made of.

    Attributes:
        matrix: itself.
        squares: σ² [p] with p = min(m, n), ascending; rounding may leave negative ones.
        vectors: [p, p], the singular vectors of the shorter side, as columns in the same order.
    """

    matrix: Tensor
    squares: Tensor
    vectors: Tensor

    def triplets(self, k: int, *, smallest: bool = False) -> Triplets:
        """The k largest, or the k smallest of all."""
        wide = wide_of(self.matrix)
        U = (self.vectors[:, :k] if smallest else self.vectors[:, -k:]).flip(1)
        # Signs are free, and LoRA-GA pairs vectors of several triplets: rounding must not choose
        # them.
        U = U * U.gather(0, U.abs().argmax(0, keepdim=True)).sign()
        Y = torch.cat([block.t() @ U for block in column_blocks(wide)])
        S = torch.linalg.vector_norm(Y, dim=0)
        V = Y / S.clamp(min=torch.finfo(S.dtype).tiny)  # of 0, zeros and not NaN
        return Triplets(U, S, V) if wide is self.matrix else Triplets(V, S, U)


@torch.no_grad()
def spectrum(matrix: Tensor) -> Spectrum | None:
    """Decompose a matrix [m, n]; None if it is not finite."""
    gram = _lower_gram(wide_of(matrix))
    if not bool(gram.isfinite().all()):
        return None
    return Spectrum(matrix, *torch.linalg.eigh(gram, UPLO="L"))


@torch.no_grad()
def triplets(matrix: Tensor, k: int, *, smallest: bool = False) -> Triplets | None:
    """The k largest, or the k smallest of all min(m, n), singular triplets of a matrix [m, n].

    Returns:
        None where one of them is zero, or the matrix is not finite.
    """
    whole = spectrum(matrix)
    if whole is None:
        return None
    found = whole.triplets(k, smallest=smallest)
    largest = whole.squares[-1].clamp(min=0).sqrt()
    # Nor where all are zero.
    return found if bool((found.S / largest > DEAD).all()) else None


def wide_of(matrix: Tensor) -> Tensor:
    """The matrix, or its transpose where that is the wide one."""
    return matrix if matrix.shape[0] <= matrix.shape[1] else matrix.t()


def _lower_gram(wide: Tensor) -> Tensor:
    """M·Mᵀ in float64 on and below the diagonal, in strips: it is symmetric."""
    p = wide.shape[0]
    gram = torch.zeros(p, p, dtype=torch.float64, device=wide.device)
    width = -(-p // _STRIPS)
    for block in column_blocks(wide):
        for start in range(0, p, width):
            strip = slice(start, start + width)
            gram[start:, strip].addmm_(block[start:], block[strip].t())
    return gram


def column_blocks(wide: Tensor) -> Iterator[Tensor]:
    """The columns of a matrix, some at a time, in float64, each in the memory of the one before.

    New memory for each would leave holes between what stays: the heap grew to M in float64.
    """
    p, width = wide.shape[0], max(1, _BLOCK // wide.shape[0])
    memory = torch.empty(p * min(width, wide.shape[1]), dtype=torch.float64, device=wide.device)
    for columns in wide.split(width, dim=1):
        yield memory[: columns.numel()].view(p, -1).copy_(columns)
