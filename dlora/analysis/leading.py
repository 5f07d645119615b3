"""The largest singular triplets of W0, in the memory of a few blocks beside it.

    short side p ≤ 1024    eigenvectors of the Gram matrix [p, p], exact
    longer                 block Krylov: span{Q, G·Q, G²·Q, …} of G = M·Mᵀ, Q [p, k + 8]

The Gram matrix of a long side and its eigenvectors would take more memory than W0. The Krylov space
is built in float64 with full orthogonalisation, from a seed, until ‖G·u − σ²·u‖ ≤ 1e-8·σ₁² for all
k vectors; a space that grew too large is started again from its best vectors.

Source: Musco and Musco 2015, https://arxiv.org/abs/1504.05477.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dlora.lora.init.svd import Triplets, column_blocks, spectrum, wide_of

_EXACT = 1024  # of the short side: its Gram matrix and eigenvectors take 33 MB
_OVERSAMPLING = 8
_TOLERANCE = 1e-8
_SPACE = 1 << 20  # elements of the basis; as many again of its product with G
_PRODUCTS = 400  # with G, before it is given up


def leading(W: Tensor, k: int, *, exact: int = _EXACT) -> Triplets:
    """The k largest singular triplets of W [m, n], which must be finite; k ≤ min(m, n).

    Args:
        exact: the longest short side that is decomposed as a whole.
    """
    if min(W.shape) > exact:
        found = _krylov(wide_of(W), k)
        if found is not None:
            U, S, V = found
            return Triplets(U, S, V) if wide_of(W) is W else Triplets(V, S, U)
    whole = spectrum(W)
    assert whole is not None  # it is finite
    return whole.triplets(k)


def _krylov(M: Tensor, k: int) -> Triplets | None:
    """The triplets of M [p, q], p ≤ q; None where the spectrum is too flat to find them."""
    p, width = M.shape[0], min(k + _OVERSAMPLING, M.shape[0])
    most = max(_SPACE // p, 3 * width)
    draw = torch.Generator().manual_seed(0)
    Q = _orthonormal(torch.randn(p, width, generator=draw, dtype=torch.float64))
    basis, product = Q, _gram_times(M, Q)
    for _ in range(_PRODUCTS):
        projected = basis.t() @ product
        values, vectors = torch.linalg.eigh((projected + projected.t()) / 2)
        best = vectors[:, -width:].flip(1)
        u, Gu = basis @ best, product @ best
        theta = values[-width:].flip(0)
        apart = torch.linalg.vector_norm(Gu - u * theta, dim=0)[:k]
        if bool((apart <= _TOLERANCE * theta[0].clamp(min=0)).all()):
            return _triplets(M, u[:, :k])
        next_block = product[:, -width:]
        if basis.shape[1] + width > min(most, p):
            basis, product, next_block = u, Gu, Gu - u * theta
        Q = _orthonormal(next_block, basis)
        basis, product = torch.cat([basis, Q], 1), torch.cat([product, _gram_times(M, Q)], 1)
    return None


def _orthonormal(block: Tensor, basis: Tensor | None = None) -> Tensor:
    """An orthonormal basis of a block's columns, less what `basis` has of them; twice is enough."""
    for _ in range(2):
        if basis is not None:
            block = block - basis @ (basis.t() @ block)
        block = torch.linalg.qr(block).Q
    return block


def _gram_times(M: Tensor, Q: Tensor) -> Tensor:
    """M·(Mᵀ·Q)."""
    out = torch.zeros_like(Q)
    for block in column_blocks(M):
        out += block @ (block.t() @ Q)
    return out


def _triplets(M: Tensor, U: Tensor) -> Triplets:
    Y = torch.cat([block.t() @ U for block in column_blocks(M)])
    S = torch.linalg.vector_norm(Y, dim=0)
    return Triplets(U, S, Y / S.clamp(min=torch.finfo(S.dtype).tiny))
