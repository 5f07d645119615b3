"""The formulas: golden cases, float64, PEFT's own functions, and what must not matter."""

import math
from collections.abc import Sequence
from contextlib import nullcontext

import pytest
import torch
from peft.utils import merge_utils
from torch import Tensor

from dlora.library.low_rank import Product, truncate_matrix, truncate_product
from dlora.library.mixtures import (
    METHODS,
    ON_FACTORS,
    RANDOM,
    How,
    Part,
    dropped,
    kept_from,
    merge_signs,
    seeded,
)

M, N = 23, 31
HOW = How(rank=3, density=0.4)


def parts(*weights: float, ranks: Sequence[int] = (2, 2, 2)) -> list[Part]:
    torch.manual_seed(0)
    return [
        Part(w, 0.5 + i, torch.randn(r, N), torch.randn(M, r), f"adapter {i}")
        for i, (w, r) in enumerate(zip(weights, ranks, strict=False))
    ]


def update(part: Part) -> Tensor:
    return part.scaling * part.B.double() @ part.A.double()


def value(product: Product) -> Tensor:
    return product.B.double() @ product.A.double()


def apart(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


def best(D: Tensor, k: int) -> Tensor:
    U, S, Vt = torch.linalg.svd(D.double(), full_matrices=False)
    return (U[:, :k] * S[:k]) @ Vt[:k]


def test_ties_golden():
    one = torch.tensor([1, -2, 0.5, 0.1, -3, 0])
    other = torch.tensor([-0.5, -1, 2, 0.2, 3.5, 0])
    kept = [t.masked_fill(t.abs() < kept_from(t.abs(), 0.5), 0) for t in (one, other)]
    merged = torch.tensor([1, -1.5, 2, 0, 3.5, 0])
    assert torch.equal(merge_signs(kept, [1, 1]), merged)
    assert torch.equal(merge_signs(kept, [0.5, 0.5]), merged / 2)


def test_cat_is_the_sum_in_float64():
    mix = parts(0.7, -0.3, 1.2, ranks=(2, 5, 1))
    made = METHODS["cat"](mix, HOW)
    assert made.A.shape == (8, N)
    assert apart(value(made), sum(part.weight * update(part) for part in mix)) < 1e-6


@pytest.mark.parametrize("k", [1, 3, 8])
def test_svd_is_the_best_of_its_rank(k):
    mix = parts(0.7, -0.3, 1.2, ranks=(2, 5, 1))
    D = sum(part.weight * update(part) for part in mix)
    made = METHODS["svd"](mix, How(k, 1.0))
    S = torch.linalg.svdvals(D)
    assert apart(value(made), best(D, k)) < 1e-6
    assert made.lost / made.energy == pytest.approx(
        float(S[k:].square().sum() / S.square().sum()), abs=1e-12
    )
    assert apart(value(made), D) == pytest.approx(math.sqrt(made.lost / made.energy), abs=1e-6)


@pytest.mark.parametrize("shape", [(M, N), (N, M), (700, 5), (5, 700)])
@pytest.mark.parametrize("k", [2, 5])
def test_a_dense_matrix_is_truncated_as_by_svd(shape, k):
    torch.manual_seed(0)
    D = torch.randn(shape)
    made = truncate_matrix(D.clone(), k)
    S = torch.linalg.svdvals(D.double())
    assert apart(value(made), best(D, k)) < 1e-6
    assert made.lost / made.energy == pytest.approx(
        float(S[k:].square().sum() / S.square().sum()), abs=1e-12
    )
    torch.testing.assert_close(made.A @ made.A.t(), torch.eye(k), atol=1e-6, rtol=0)


def test_signs_are_those_of_the_largest_entry():
    torch.manual_seed(0)
    for made in (truncate_matrix(torch.randn(M, N), 4), truncate_product(*_factors(4), 4)):
        assert (made.B.gather(0, made.B.abs().argmax(0, keepdim=True)) > 0).all()


def _factors(r: int) -> tuple[Tensor, Tensor]:
    return torch.randn(r, N), torch.randn(M, r)


def test_nothing_is_truncated_to_nothing():
    for made in (
        truncate_matrix(torch.zeros(M, N), 2),
        truncate_product(torch.zeros(3, N), torch.zeros(M, 3), 2),
    ):
        assert made.lost == made.energy == 0
        assert value(made).abs().max() == 0 and made.A.isfinite().all()


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.7, -0.3, 1.2)])
@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
def test_ties_is_peft_s(weights, density):
    mix = parts(*weights)
    deltas = [update(part).float() for part in mix]
    with pytest.warns(UserWarning) if density == 1 else nullcontext():
        wanted = merge_utils.ties(deltas, torch.tensor(weights), density)
    made = METHODS["ties_svd"](mix, How(min(M, N), density))
    assert apart(value(made), wanted.double()) < 1e-5


def test_a_share_of_less_than_an_element_keeps_none():
    assert kept_from(torch.ones(9), 0.1) == math.inf


@pytest.mark.parametrize("density", [0.3, 0.9])
def test_dare_keeps_the_mean(density):
    t = torch.full((400, 500), 2.0)
    made = dropped(t, density, seeded("0", "x"))
    assert set(made.unique().tolist()) == {0.0, float(torch.tensor(2.0) / density)}
    assert float(made.mean()) == pytest.approx(2.0, rel=0.01)
    assert torch.equal(made, dropped(t, density, seeded("0", "x")))
    assert not torch.equal(made, dropped(t, density, seeded("1", "x")))


def test_dare_of_updates_has_their_elements():
    """With all ranks kept the result is D itself, whose elements are 0 or those of ΔW / density."""
    [part] = parts(0.7)
    made = METHODS["dare_svd"]([part], How(min(M, N), 0.4))
    ratio = value(made) / (0.7 * update(part))
    is_kept = ratio > 1
    torch.testing.assert_close(
        ratio[is_kept], torch.full_like(ratio[is_kept], 2.5), atol=1e-2, rtol=0
    )
    assert float(ratio[~is_kept].abs().max()) < 1e-2
    assert 0.3 < float(is_kept.double().mean()) < 0.5


@pytest.mark.parametrize("method", METHODS)
def test_the_order_does_not_matter(method):
    mix = parts(0.7, -0.3, 1.2)
    one, other = (METHODS[method](each, HOW) for each in (mix, mix[::-1]))
    assert apart(value(one), value(other)) < 1e-6


@pytest.mark.parametrize("method", METHODS)
def test_factors_of_the_same_update(method):
    """(B·R, R⁻¹·A) changes what works on A and B, and nothing else. DARE's mask is the update's."""
    mix = parts(0.7, -0.3, 1.2)
    gauges = [torch.tensor([[2.0, 1.0], [-1.0, 1.0 + i]]) for i in range(3)]
    gauged = [
        p._replace(A=torch.linalg.solve(R, p.A), B=p.B @ R)
        for p, R in zip(mix, gauges, strict=True)
    ]
    one, other = (value(METHODS[method](each, HOW)) for each in (mix, gauged))
    if method in ON_FACTORS:
        assert apart(one, other) > 0.1
    else:
        assert apart(one, other) < 1e-5


def test_masks_are_of_seed_adapter_and_method():
    for method in RANDOM:
        [part] = parts(1.0)
        one, same, other = (
            value(METHODS[method]([part._replace(seed=seed)], How(9, 0.5))) for seed in "aab"
        )
        assert torch.equal(one, same)
        assert not torch.equal(one, other)
