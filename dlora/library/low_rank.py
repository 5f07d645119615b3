"""The best approximation of a matrix by a product of two thin ones, with its energy.

    M [m, n] = U·S·Vᵀ,   M ≈ B·A   with   B = U_k·S_k^½ [m, k],   A = S_k^½·V_kᵀ [k, n]
    energy   e_k = Σ_{i≤k} σᵢ² / Σ σᵢ²,   so that   ‖M − B·A‖² = (1 − e_k)·‖M‖²

A and B have equal norms (PEFT's `convert_to_lora` leaves all of S in B), which training that goes
on from them wants. Signs are those that make the largest entry of each column of B positive.

Source: Eckart and Young 1936; as a LoRA, https://arxiv.org/abs/2106.09685, section 7.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dlora.errors import UsageError
from dlora.library.truncation import with_signs
from dlora.lora.init.svd import DEAD, Spectrum, spectrum


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
        live = int((squares > DEAD**2 * squares[0]).sum())
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


@dataclass(frozen=True)
class Decomposed:
    """A matrix that is not zero, of which nothing has been cut yet."""

    spectrum: Spectrum

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
        return cls(found)

    @property
    def squares(self) -> Tensor:
        """σ² [min(m, n)], descending, in float64."""
        return self.spectrum.squares.flip(0).clamp(min=0)

    def cut(self, k: int) -> LowRank:
        """The best approximation of rank k."""
        A, B = with_signs(*self.spectrum.triplets(k).balanced(1.0))
        A, B = A.float().cpu().contiguous(), B.float().cpu().contiguous()
        squares = self.squares
        return LowRank(A, B, float(squares[:k].sum() / squares.sum()))
