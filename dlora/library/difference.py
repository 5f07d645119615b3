"""Two adapters side by side: settings, what they adapt, and how far their updates are apart.

‖B·A‖ of any factors is ‖R_B·R_Aᵀ‖ with B = Q_B·R_B and Aᵀ = Q_A·R_A. So ‖ΔW₁ − ΔW₂‖ is that of
[B₁ B₂]·[s₁A₁; −s₂A₂], in float64, without a matrix of W0's size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from dlora.errors import and_more
from dlora.library.stored import Place, StoredAdapter

# Of `adapter_config.json`, what says how an adapter was written and not what it is.
_NOT_COMPARED = {"peft_version", "inference_mode", "base_model_name_or_path"}


def difference_lines(one: StoredAdapter, other: StoredAdapter) -> Iterator[str]:
    """What differs, line by line."""
    keys = sorted((one.settings.keys() | other.settings.keys()) - _NOT_COMPARED)
    for key in keys:
        a, b = one.settings.get(key), other.settings.get(key)
        if a != b and (a or b):
            yield f"{key}: {_short(a)} -> {_short(b)}"
    for sign, left, right in (("-", one, other), ("+", other, one)):
        if alone := [path for path in left.places if path not in right.places]:
            yield f"{sign} {len(alone)} weights: {and_more(alone)}"
    squares = [0.0, 0.0, 0.0]
    both = [path for path in one.places if path in other.places]
    if both:
        yield f"{'norm of the update':<60} {'before':>9} {'after':>9} {'difference':>11}"
    for path in both:
        a, b = one.places[path], other.places[path]
        if a.shape != b.shape:
            yield f"{path:<60} [m, n] {list(a.shape[1:])} -> {list(b.shape[1:])}"
            continue
        norms = norm([(1.0, a)]), norm([(1.0, b)]), norm([(1.0, a), (-1.0, b)])
        squares = [total + n**2 for total, n in zip(squares, norms, strict=True)]
        ranks = "" if a.r == b.r else f"  r {a.r} -> {b.r}"
        yield f"{path:<60} {norms[0]:>9.4g} {norms[1]:>9.4g} {norms[2]:>11.4g}{ranks}"
    if both:
        before, after, apart = (math.sqrt(square) for square in squares)
        yield f"{'all':<60} {before:>9.4g} {after:>9.4g} {apart:>11.4g}"


def norm(terms: list[tuple[float, Place]]) -> float:
    """‖Σ w·ΔW‖ (Frobenius) of places of one shape."""
    factors = [(w * place.scaling, *place.factors(torch.float64)) for w, place in terms]
    A = torch.cat([scale * A for scale, A, _ in factors], dim=1)
    B = torch.cat([B for _, _, B in factors], dim=2)
    R_A, R_B = (torch.linalg.qr(t, mode="r").R for t in (A.mT, B))
    product: Tensor = R_B @ R_A.mT
    return float(product.norm())


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
