"""Two adapters of one base: how similar their updates are, matrix by matrix.

input    φ(i, j) of V₁ and V₂     what both read
output   φ(i, j) of U₁ and U₂     what both write
cosine   ⟨ΔW₁, ΔW₂⟩ / (‖ΔW₁‖·‖ΔW₂‖)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dlora.analysis.subspaces import similarity
from dlora.lora.init.svd import Triplets


@dataclass(frozen=True)
class Beside:
    """ΔW [m, n] of two adapters at one place.

    Attributes:
        input, output: φ [k₁, k₂]; None where one of them is 0.
        cosine: likewise.
    """

    m: int
    n: int
    update: float
    input: Tensor | None = None
    output: Tensor | None = None
    cosine: float | None = None

    def record(self) -> dict[str, Any]:
        """As JSON: φ of the first directions alone and of all, and what random ones would have."""
        if self.input is None or self.output is None:
            return {"update": self.update}
        most = max(self.input.shape)
        found: dict[str, Any] = {"update": self.update, "cosine": self.cosine}
        for name, phi, size in (("input", self.input, self.n), ("output", self.output, self.m)):
            found[name] = {
                "k": list(phi.shape),
                "first": float(phi[0, 0]),
                "all": float(phi[-1, -1]),
                "random": most / size,
            }
        return found


def compare(m: int, n: int, one: Triplets | None, other: Triplets | None) -> Beside:
    """Compare the directions of two updates."""
    update = 0.0 if other is None else float(other.S.norm())
    if one is None or other is None:
        return Beside(m, n, update)
    inner = float(((one.U * one.S).t() @ (other.U * other.S)).mul(one.V.t() @ other.V).sum())
    return Beside(
        m,
        n,
        update,
        similarity(one.V, other.V),
        similarity(one.U, other.U),
        inner / (float(one.S.norm()) * update),
    )
