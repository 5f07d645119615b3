"""A sum of matrices that is kept in factors: L·R with L [m, q], R [q, n].

    S = L·R + G;   L ← an orthonormal basis of the range of S, found from S·Ω by four rounds of
    subspace iteration;   R ← Lᵀ·S

It is exact as long as the sum's rank is at most q; otherwise what is cut off is close to the least
possible, the singular values past q. Ω is the same for everyone.

Source: Halko, Martinsson, Tropp 2011, https://arxiv.org/abs/0909.4061, algorithm 4.4.
"""

from __future__ import annotations

import torch
from torch import Tensor

_ROUNDS = 4


class LowRankSum:
    """Starts at zero.

    Args:
        q: rank that is kept, at most min(m, n).
    """

    def __init__(self, q: int) -> None:
        self.q, self._terms = q, 0
        self._L: Tensor | None = None
        self._R: Tensor | None = None

    @torch.no_grad()
    def add(self, G: Tensor) -> None:
        """Add a matrix [m, n], which is used up."""
        if self._L is not None and self._R is not None:
            G.addmm_(self._L, self._R)
        draw = torch.Generator().manual_seed(self._terms)
        omega = torch.randn(G.shape[1], self.q, generator=draw, dtype=G.dtype).to(G.device)
        L = torch.linalg.qr(G @ omega).Q
        for _ in range(_ROUNDS):
            L = torch.linalg.qr(G @ torch.linalg.qr(G.t() @ L).Q).Q
        self._L, self._R, self._terms = L, L.t() @ G, self._terms + 1

    @torch.no_grad()
    def whole(self) -> Tensor:
        """The sum [m, n].

        Raises:
            ValueError: nothing was added.
        """
        if self._L is None or self._R is None:
            raise ValueError("an empty sum has no shape")
        return self._L @ self._R
