"""The best B·A of rank k of a matrix: its spectrum, where that is cut, and the factors.

    M [m, n] = U·S·Vᵀ,   M ≈ U_k·S_k·V_kᵀ,   ‖M − U_k·S_k·V_kᵀ‖² = Σ_{i>k} σᵢ²

    of a matrix     eigenvectors of the smaller of M·Mᵀ and Mᵀ·M                       m·n·min(m, n)
    of B·A, rank R  QR(B) = Q_B·R_B,  QR(Aᵀ) = Q_A·R_A,  SVD(R_B·R_Aᵀ)                 (m+n)·R²

    balanced        B = U_k·S_k^½, A = S_k^½·V_kᵀ     equal norms, which training that goes on wants
    orthonormal A   B = U_k·S_k,   A = V_kᵀ           as PEFT composes and converts

All of it is computed in float64. An eigenvalue σ² of M·Mᵀ is exact to 1e-16·σ₁², so a σ of 1e-6·σ₁
to 1e-4, which is below what float32 stores of M. Signs are those that make the largest entry of
each column of B positive, so that files are reproducible.

Source: Eckart and Young 1936; as a LoRA, https://arxiv.org/abs/2106.09685, section 7.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dlora.errors import UsageError
from dlora.lora.init.svd import DEAD, Triplets, spectrum


@dataclass(frozen=True)
class Cut:
    """Where a spectrum ends: after `rank` values, or as soon as `energy` of the squares is kept."""

    rank: int | None = None
    energy: float | None = None

    def of(self, squares: Tensor) -> int:
        """k, at least 1.

        Args:
            squares: σ² in descending order. Those below (1e-6·σ₁)² are rounding, and none of k.
        """
        live = max(int((squares > DEAD**2 * squares[0]).sum()), 1)
        if self.energy is None:
            assert self.rank is not None
            return min(self.rank, live)
        sums = squares.cumsum(0)
        return min(int(torch.searchsorted(sums, self.energy * sums[-1])) + 1, live)


class LowRank(NamedTuple):
    """B·A, A [k, n] and B [m, k] in float32 on the CPU, and the share of the energy that it has."""

    A: Tensor
    B: Tensor
    energy: float


class Product(NamedTuple):
    """B·A, A [k, n] and B [m, k].

    Attributes:
        lost, energy: Σ σ² behind the k-th, and of all; 0 where nothing was cut.
    """

    A: Tensor
    B: Tensor
    lost: float = 0.0
    energy: float = 0.0


@dataclass(frozen=True)
class Decomposed:
    """A matrix with its singular values, of which nothing has been cut yet.

    Attributes:
        squares: σ², descending, in float64.
        triplets: makes the k largest.
    """

    squares: Tensor
    triplets: Callable[[int], Triplets]

    @classmethod
    def of(cls, matrix: Tensor, what: str) -> Decomposed:
        """Decompose a matrix [m, n].

        Args:
            what: its name in the error.

        Raises:
            UsageError: it has NaN or infinite values.
        """
        found = spectrum(matrix)
        if found is None:
            raise UsageError(f"{what}: contains NaN or infinite values")
        # Rounding may leave negative ones.
        return cls(found.squares.flip(0).clamp(min=0), found.triplets)

    @classmethod
    def of_product(cls, A: Tensor, B: Tensor) -> Decomposed:
        """Decompose B·A, A [R, n] and B [m, R], without forming it."""
        Q_B, R_B = torch.linalg.qr(B.double())
        Q_A, R_A = torch.linalg.qr(A.double().t())
        U, S, Vt = torch.linalg.svd(R_B @ R_A.t(), full_matrices=False)

        def triplets(k: int) -> Triplets:
            return Triplets(Q_B @ U[:, :k], S[:k], Q_A @ Vt[:k].t())

        return cls(S.square(), triplets)

    def cut(self, k: int) -> LowRank:
        """The best approximation of rank k, with balanced factors."""
        A, B = _stored(*self.triplets(k).balanced(1.0))
        lost, energy = self._energies(k)
        return LowRank(A, B, 1 - lost / energy if energy else 1.0)

    def truncated(self, k: int) -> Product:
        """The best approximation of rank k, with an orthonormal A."""
        U, S, V = self.triplets(k)
        return Product(*_stored(V.t(), U * S), *self._energies(k))

    def _energies(self, k: int) -> tuple[float, float]:
        return float(self.squares[k:].sum()), float(self.squares.sum())


def truncate_product(A: Tensor, B: Tensor, k: int) -> Product:
    """The best rank-k approximation of B·A, A [R, n] and B [m, R], without forming it."""
    return Decomposed.of_product(A, B).truncated(k)


def truncate_matrix(D: Tensor, k: int) -> Product:
    """The best rank-k approximation of D [m, n], float32.

    Raises:
        UsageError: it has NaN or infinite values.
    """
    return Decomposed.of(D, "the mix").truncated(k)


def _stored(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """A [k, n] and B [m, k] with their signs fixed, as files have them."""
    largest = B.gather(0, B.abs().argmax(0, keepdim=True))
    sign = torch.where(largest < 0, -1.0, 1.0).to(B.dtype)
    A, B = A * sign.t(), B * sign
    return A.float().cpu().contiguous(), B.float().cpu().contiguous()
