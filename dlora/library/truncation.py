"""The best approximation of rank k: D ≈ B·A with B = U_k·S_k [m, k] and A = V_kᵀ [k, n].

    of Σ wᵢ·sᵢ·Bᵢ·Aᵢ   QR([B₁ …]) = Q_B·R_B,  QR([w₁s₁A₁; …]ᵀ) = Q_A·R_A,  SVD(R_B·R_Aᵀ)   (m+n)·R²
    of a dense D       eigenvectors of the smaller of D·Dᵀ and Dᵀ·D                  m·n·min(m, n)

Energy lost: Σ_{i>k} σᵢ² / Σ σᵢ², which is ‖D − B·A‖² / ‖D‖² (Eckart and Young 1936). Signs are
those that make the largest entry of each column of B positive, so that files are reproducible.

Both are computed in float64. An eigenvalue σ² of D·Dᵀ is exact to 1e-16·σ₁², so a σ of 1e-6·σ₁ to
1e-4, which is below what float32 stores of D.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

_BLOCK = 512  # columns of D in float64 at a time


class Product(NamedTuple):
    """B·A of rank k, A [k, n] and B [m, k], float32.

    Attributes:
        lost, energy: Σ σ² behind the k-th, and of all.
    """

    A: Tensor
    B: Tensor
    lost: float = 0.0
    energy: float = 0.0


def truncate_product(A: Tensor, B: Tensor, k: int) -> Product:
    """The best rank-k approximation of B·A, A [R, n] and B [m, R], without forming it."""
    Q_B, R_B = torch.linalg.qr(B.double())
    Q_A, R_A = torch.linalg.qr(A.double().t())
    U, S, Vt = torch.linalg.svd(R_B @ R_A.t(), full_matrices=False)
    return _signed(Vt[:k] @ Q_A.t(), (Q_B @ U[:, :k]) * S[:k], S.square())


def truncate_matrix(D: Tensor, k: int) -> Product:
    """The best rank-k approximation of D [m, n], float32."""
    is_wide = D.shape[0] <= D.shape[1]
    rows = D if is_wide else D.t()
    gram = torch.zeros(rows.shape[0], rows.shape[0], dtype=torch.float64)
    for _, block in _wide_blocks(rows):
        gram.addmm_(block, block.t())
    values, vectors = torch.linalg.eigh(gram)
    del gram
    values, basis = values.flip(0).clamp(min=0), vectors[:, -k:].flip(1)
    other = torch.empty(basis.shape[1], rows.shape[1], dtype=torch.float64)
    for columns, block in _wide_blocks(rows):
        other[:, columns] = basis.t() @ block
    if not is_wide:
        return _signed(basis.t(), other.t(), values)
    S = other.norm(dim=1)
    return _signed(other / S.clamp(min=torch.finfo(S.dtype).tiny)[:, None], basis * S, values)


def _wide_blocks(rows: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """(columns, these columns of a matrix in float64), one after the other, in the same memory.

    New memory for each would leave holes between what stays: the heap grew to D in float64.
    """
    memory = torch.empty(_BLOCK * rows.shape[0], dtype=torch.float64)
    for start in range(0, rows.shape[1], _BLOCK):
        columns = slice(start, min(start + _BLOCK, rows.shape[1]))
        width = columns.stop - start
        block = memory[: rows.shape[0] * width].view(rows.shape[0], width)
        yield columns, block.copy_(rows[:, columns])


def _signed(A: Tensor, B: Tensor, energies: Tensor) -> Product:
    """The product with its signs fixed.

    Args:
        energies: σ², descending.
    """
    lost, energy = float(energies[A.shape[0] :].sum()), float(energies.sum())
    A, B = with_signs(A, B)
    return Product(A.float(), B.float(), lost, energy)


def with_signs(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """A [k, n] and B [m, k] with signs that make the largest entry of each column of B positive."""
    largest = B.gather(0, B.abs().argmax(0, keepdim=True))
    sign = torch.where(largest < 0, -1.0, 1.0).to(B.dtype)
    return A * sign.t(), B * sign
