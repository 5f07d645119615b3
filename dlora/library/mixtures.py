"""Formulas of composition, on whole plain tensors: A [k, n] and B [m, k] from several adapters.

Of adapter i: its weight wᵢ, its update Dᵢ = sᵢ·Bᵢ·Aᵢ [m, n], Aᵢ [rᵢ, n], Bᵢ [m, rᵢ].

    cat       A = [wᵢ·sᵢ·Aᵢ] stacked, B = [Bᵢ] side by side: exactly Σ wᵢ·Dᵢ, k = Σ rᵢ
    svd       the best rank k of Σ wᵢ·Dᵢ
    ties_svd  the best rank k of T(D₁, …)
    dare_svd  the best rank k of Σ wᵢ·M(Dᵢ)
    linear    A = Σ ±√|wᵢ·sᵢ|·Aᵢ, B = Σ √|wᵢ·sᵢ|·Bᵢ: with cross terms √(wᵢwⱼ)·BᵢAⱼ
    ties      T of the Aᵢ, and T of the Bᵢ, with those weights
    dare      Σ ±√|wᵢ·sᵢ|·M(Aᵢ), and so of B

    T(t₁, …)  keep of each tᵢ the share `density` of largest |·|; the elected sign of an element is
              that of the sum of what was kept (of 0: +); the mean of wᵢ·tᵢ over those that agree
    M(t)      each element with probability `density`, divided by it; else 0

The last three are PEFT's (`add_weighted_adapter`: linear, ties, dare_linear). They depend on how
Dᵢ is factorised: (B·R, R⁻¹·A) is the same adapter and gives another result. In T the sign is
elected without weights, as in PEFT.

Source: TIES, Yadav et al. 2023, https://arxiv.org/abs/2306.01708; DARE, Yu et al. 2023,
https://arxiv.org/abs/2311.03099; PEFT 0.21.2, `peft/utils/merge_utils.py`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dlora.library.low_rank import Product, truncate_matrix, truncate_product

_BLOCK_ELEMENTS = 1 << 19  # of D that are made of all adapters at a time


class Part(NamedTuple):
    """What one adapter brings to a matrix: w, s, A [r, n], B [m, r], and the seed of its masks."""

    weight: float
    scaling: float
    A: Tensor
    B: Tensor
    seed: str = ""


class How(NamedTuple):
    """k of the truncating methods, and the density of TIES and DARE."""

    rank: int
    density: float


def cat(parts: Sequence[Part], how: How) -> Product:
    """The exact sum, of rank Σ rᵢ."""
    A = torch.cat([part.A * (part.weight * part.scaling) for part in parts])
    return Product(A, torch.cat([part.B for part in parts], dim=1))


def svd(parts: Sequence[Part], how: How) -> Product:
    """The best rank k of the sum."""
    wide = [part._replace(A=part.A.double(), B=part.B.double()) for part in parts]
    summed = cat(wide, how)
    return truncate_product(summed.A, summed.B, how.rank)


def ties_svd(parts: Sequence[Part], how: How) -> Product:
    """TIES of the updates, then the best rank k."""
    D = torch.empty(parts[0].B.shape[0], parts[0].A.shape[1])
    limits = [kept_from(_filled(D, part).abs_().view(-1), how.density) for part in parts]
    weights = [part.weight for part in parts]
    for rows in _row_blocks(D):
        D[rows] = merge_signs(
            [
                _trimmed(_update(part, rows), limit)
                for part, limit in zip(parts, limits, strict=True)
            ],
            weights,
        )
    return truncate_matrix(D, how.rank)


def dare_svd(parts: Sequence[Part], how: How) -> Product:
    """DARE of the updates, then the best rank k."""
    D = torch.zeros(parts[0].B.shape[0], parts[0].A.shape[1])
    for part in parts:
        generator = seeded(part.seed, "D")
        for rows in _row_blocks(D):
            D[rows] += part.weight * dropped(_update(part, rows), how.density, generator)
    return truncate_matrix(D, how.rank)


def linear(parts: Sequence[Part], how: How) -> Product:
    """PEFT's `linear`."""
    A, B = (
        sum(w * t for w, t in zip(weights, tensors, strict=True))
        for weights, tensors in _factors(parts)
    )
    return Product(A, B)  # type: ignore[arg-type]  # the sums are of tensors


def ties(parts: Sequence[Part], how: How) -> Product:
    """PEFT's `ties`."""
    A, B = (
        merge_signs(
            [_trimmed(t, kept_from(t.abs().flatten(), how.density)) for t in tensors], weights
        )
        for weights, tensors in _factors(parts)
    )
    return Product(A, B)


def dare(parts: Sequence[Part], how: How) -> Product:
    """PEFT's `dare_linear`."""
    A, B = (
        sum(
            weight * dropped(tensor, how.density, seeded(part.seed, name))
            for weight, tensor, part in zip(weights, tensors, parts, strict=True)
        )
        for name, (weights, tensors) in zip("AB", _factors(parts), strict=True)
    )
    return Product(A, B)  # type: ignore[arg-type]


Mixture = Callable[[Sequence[Part], How], Product]
METHODS: dict[str, Mixture] = {
    method.__name__: method for method in (cat, svd, ties_svd, dare_svd, linear, ties, dare)
}
TRUNCATING = ("svd", "ties_svd", "dare_svd")
ON_FACTORS = ("linear", "ties", "dare")
WITH_DENSITY = ("ties_svd", "dare_svd", "ties", "dare")
RANDOM = ("dare_svd", "dare")


def kept_from(sizes: Tensor, density: float) -> float:
    """The smallest of the share `density` of largest values; inf: it has none.

    Args:
        sizes: absolute values, [numel]; they are put into another order.
    """
    count = int(density * len(sizes))
    if count == 0:
        return math.inf
    values = sizes.numpy()
    values.partition(len(values) - count)  # in place: no second matrix
    return float(values[len(values) - count])


def merge_signs(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """The mean of wᵢ·tᵢ over those whose sign is that of Σ tᵢ, element by element."""
    positive = sum(tensors[1:], tensors[0]) >= 0
    merged, number = torch.zeros_like(tensors[0]), torch.zeros_like(tensors[0])
    for tensor, weight in zip(tensors, weights, strict=True):
        agrees = torch.where(positive, tensor > 0, tensor < 0)
        merged += weight * tensor * agrees
        number += agrees
    return merged / number.clamp_(min=1)


def dropped(tensor: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """Each element with probability `density`, divided by it; else 0."""
    return tensor * (torch.rand(tensor.shape, generator=generator) < density) / density


def seeded(seed: str, name: str) -> torch.Generator:
    """A generator of its own for each seed and name, whatever else draws."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))


def _factors(parts: Sequence[Part]) -> tuple[tuple[list[float], list[Tensor]], ...]:
    """(weights, tensors) of the A, and of the B: both roots of |w·s|, the sign on A alone."""
    products = [part.weight * part.scaling for part in parts]
    roots = [math.sqrt(abs(product)) for product in products]
    signed = [math.copysign(root, product) for root, product in zip(roots, products, strict=True)]
    return (signed, [part.A for part in parts]), (roots, [part.B for part in parts])


def _update(part: Part, rows: slice) -> Tensor:
    """Rows of D; equal to the bit whenever the same rows are asked for."""
    return (part.B[rows] * part.scaling) @ part.A


def _filled(D: Tensor, part: Part) -> Tensor:
    for rows in _row_blocks(D):
        D[rows] = _update(part, rows)
    return D


def _row_blocks(D: Tensor) -> list[slice]:
    step = max(1, _BLOCK_ELEMENTS // D.shape[1])
    return [slice(first, first + step) for first in range(0, D.shape[0], step)]


def _trimmed(tensor: Tensor, limit: float) -> Tensor:
    return tensor.masked_fill(tensor.abs() < limit, 0)
