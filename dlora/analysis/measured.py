"""The figures of one matrix: its update alone, and beside W0."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from dlora.analysis.leading import leading
from dlora.analysis.opened import Update
from dlora.analysis.subspaces import effective_rank, live, norm, projection, similarity
from dlora.library.low_rank import Cut
from dlora.lora.init.svd import Triplets


@dataclass(frozen=True)
class Figures:
    """ΔW [m, n] and W0 of one matrix; k is how many of the r singular values are not rounding.

    Attributes:
        update, base: ‖ΔW‖ and ‖W0‖.
        sigma: the k singular values of ΔW.
        rank_90: the fewest that have 90 % of the energy Σσ².
        projection: ‖Uᵀ·W0·V‖ of ΔW's k directions; None where ΔW = 0, as the following.
        top: the same of the k largest directions of W0.
        random: the same of random ones, k·‖W0‖/√(mn).
        amplification: ‖ΔW‖ / projection; None also where W0 has nothing there.
        phi_input, phi_output: φ of ΔW's directions and W0's largest, as many as both have.
    """

    m: int
    n: int
    r: int
    update: float
    base: float
    sigma: list[float]
    effective_rank: float
    rank_90: int
    projection: float | None = None
    top: float | None = None
    random: float | None = None
    amplification: float | None = None
    phi_input: float | None = None
    phi_output: float | None = None

    def record(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


def directions(update: Update) -> Triplets | None:
    """U, S and V of ΔW without what is rounding; None where ΔW = 0."""
    decomposed = update.decomposed
    if decomposed is None or not float(decomposed.squares[0]):
        return None
    return decomposed.triplets(live(decomposed.squares.sqrt()))


def measure(r: int, found: Triplets | None, W: Tensor) -> Figures:
    """The figures of one matrix.

    Args:
        r: of the factors.
        found: `directions` of its update.
        W: W0 [m, n], finite.
    """
    m, n = W.shape
    base = norm(W)
    if found is None:
        return Figures(m, n, r, 0.0, base, [], 0.0, 0)
    U, S, V = found
    k = len(S)
    update = float(S.norm())
    projected = projection(U, W, V)
    top = leading(W, k)
    common = live(top.S) if base else 0
    return Figures(
        m,
        n,
        r,
        update,
        base,
        S.tolist(),
        effective_rank(S),
        Cut(energy=0.9).of(S.square()),
        projected,
        float(top.S.norm()),
        k * base / (m * n) ** 0.5,
        update / projected if projected else None,
        float(similarity(V, top.V[:, :common])[-1, -1]) if common else None,
        float(similarity(U, top.U[:, :common])[-1, -1]) if common else None,
    )
