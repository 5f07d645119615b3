"""The formulas of `dlora analyse` beside numpy's SVD of dense matrices, in float64."""

import math

import numpy as np
import pytest
import torch
from golden import W0, A, B
from torch import Tensor

from dlora.analysis.against import compare
from dlora.analysis.leading import leading
from dlora.analysis.measured import directions, measure
from dlora.analysis.opened import Update
from dlora.analysis.subspaces import effective_rank, norm, projection, similarity
from dlora.library.low_rank import Decomposed
from dlora.lora.init.svd import Triplets


def orthonormal(n: int, r: int, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(n, r, generator=draw, dtype=torch.float64)).Q


def update(A: Tensor, B: Tensor, scaling: float = 1.0) -> Triplets:
    found = directions(Update(len(A), Decomposed.of_product(A * scaling, B)))
    assert found is not None
    return found


# -- similarity -----------------------------------------------------------------------------------


def test_a_space_is_similar_to_itself_and_to_what_is_in_it() -> None:
    V = orthonormal(50, 8)
    phi = similarity(V, V[:, :5])
    assert phi.shape == (8, 5)
    torch.testing.assert_close(phi, torch.ones_like(phi), rtol=0, atol=1e-12)  # nested


def test_orthogonal_spaces_are_not_similar() -> None:
    V = orthonormal(50, 12)
    assert float(similarity(V[:, :7], V[:, 7:]).max()) < 1e-28


def test_a_rotation_of_both_changes_nothing() -> None:
    one, other, Q = orthonormal(40, 6, 1), orthonormal(40, 9, 2), orthonormal(40, 40, 3)
    torch.testing.assert_close(similarity(one, other), similarity(Q @ one, Q @ other))
    R = orthonormal(6, 6, 4)  # and one inside a space nothing of the space as a whole
    torch.testing.assert_close(similarity(one, other)[-1], similarity(one @ R, other)[-1])


@pytest.mark.parametrize(("i", "j", "n"), [(8, 16, 128), (4, 4, 64), (20, 3, 100)])
def test_random_spaces_have_the_similarity_that_is_expected(i: int, j: int, n: int) -> None:
    found = [
        similarity(orthonormal(n, i, s), orthonormal(n, j, s + 500))[-1, -1] for s in range(300)
    ]
    assert float(torch.stack(found).mean()) == pytest.approx(max(i, j) / n, rel=0.05)


def test_every_cell_is_the_formula() -> None:
    one, other = orthonormal(30, 5, 1), orthonormal(30, 7, 2)
    phi = similarity(one, other).numpy()
    for i in range(1, 6):
        for j in range(1, 8):
            values = np.linalg.svd(one[:, :i].t().numpy() @ other[:, :j].numpy(), compute_uv=False)
            assert phi[i - 1, j - 1] == pytest.approx((values**2).sum() / min(i, j), rel=1e-12)


def test_factors_of_the_same_update_are_the_same() -> None:
    """The similarity is that of ΔW, and not of A and B."""
    draw = torch.Generator().manual_seed(0)
    A, B, R = (
        torch.randn(*s, generator=draw, dtype=torch.float64) for s in ((4, 30), (20, 4), (4, 4))
    )
    one, other = update(A, B), update(torch.linalg.solve(R, A), B @ R)
    found = compare(20, 30, one, other)
    assert found.input is not None and found.output is not None
    for phi in (found.input, found.output):
        torch.testing.assert_close(phi.diagonal(), torch.ones(4, dtype=torch.float64))
    assert found.cosine == pytest.approx(1, rel=1e-12)
    opposite = compare(20, 30, one, update(A, B, -3.0))
    assert opposite.cosine == pytest.approx(-1, rel=1e-12)


# -- W0 -------------------------------------------------------------------------------------------


def test_the_golden_example() -> None:
    """methods.md, section 18: s = 8."""
    W = torch.tensor(W0, dtype=torch.float32)
    found = update(*(torch.tensor(t, dtype=torch.float64) for t in (A, B)), scaling=8.0)
    figures = measure(2, found, W)
    wanted = {
        "update": 2.832948994,
        "projection": 2.751345577,
        "amplification": 1.029659457,
        "base": 3.774917218,
        "phi_input": 0.644077230,
        "top": math.hypot(3.019542447, 1.710632966),
        "random": 2 * 3.774917218 / math.sqrt(20),
    }
    for name, value in wanted.items():
        assert getattr(figures, name) == pytest.approx(value, abs=2e-9), name
    assert figures.sigma == pytest.approx([2.307143224, 1.643986053], abs=1e-9)
    top = leading(W, 2)
    assert top.S.tolist() == pytest.approx([3.019542447, 1.710632966], abs=1e-9)
    phi = similarity(found.V, top.V)
    assert float(phi[0, 0]) == pytest.approx(0.751790486, abs=1e-9)


def test_a_random_update_finds_what_is_expected_of_w0() -> None:
    """Table 7's third column: r·‖W0‖/√(mn), a root mean square."""
    draw = torch.Generator().manual_seed(0)
    W = torch.randn(96, 160, generator=draw)
    squares = [
        projection(orthonormal(96, 8, s), W, orthonormal(160, 8, s + 900)) ** 2 for s in range(200)
    ]
    expected = 8 * norm(W) / math.sqrt(96 * 160)
    assert math.sqrt(sum(squares) / len(squares)) == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize("exact", [1024, 10])
@pytest.mark.parametrize("shape", [(60, 130), (130, 60), (70, 70)], ids=str)
@pytest.mark.parametrize("kind", ["flat", "falling", "rank 3", "ones", "equal", "zeros"])
def test_the_leading_triplets_are_those_of_the_svd(kind: str, shape: tuple, exact: int) -> None:
    """By eigenvectors, and by the Krylov space, which the short side of 60 is too long for here."""
    draw = torch.Generator().manual_seed(0)
    W = torch.randn(*shape, generator=draw)
    if kind == "falling":
        W = W * torch.arange(1.0, shape[1] + 1) ** -0.5
    elif kind == "rank 3":
        W = torch.randn(shape[0], 3, generator=draw) @ torch.randn(3, shape[1], generator=draw)
    elif kind != "flat":
        W = {"ones": torch.ones, "zeros": torch.zeros, "equal": torch.eye}[kind](*shape)
    U, S, V = leading(W, 5, exact=exact)
    wanted = np.linalg.svd(W.double().numpy(), compute_uv=False)[:5]
    np.testing.assert_allclose(S.numpy(), wanted, rtol=0, atol=1e-7 * max(wanted[0], 1e-300))
    live = int((S / S[0] > 1e-6).sum()) if float(S[0]) else 0
    for basis in (U[:, :live], V[:, :live]):
        torch.testing.assert_close(basis.t() @ basis, torch.eye(live, dtype=torch.float64))
    product = W.double() @ V[:, :live]
    assert (product - U[:, :live] * S[:live]).norm() <= 1e-7 * max(float(S[0]), 1e-300)


def test_a_space_that_is_full_starts_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dlora.analysis.leading._SPACE", 1)  # three blocks of vectors
    W = torch.randn(300, 500, generator=torch.Generator().manual_seed(0))
    S = leading(W, 6, exact=10).S
    wanted = np.linalg.svd(W.double().numpy(), compute_uv=False)[:6]
    np.testing.assert_allclose(S.numpy(), wanted, rtol=1e-12)


def test_a_spectrum_that_is_too_flat_is_decomposed_as_a_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("dlora.analysis.leading._PRODUCTS", 1)
    W = torch.randn(60, 90, generator=torch.Generator().manual_seed(0))
    wanted = np.linalg.svd(W.double().numpy(), compute_uv=False)[:4]
    np.testing.assert_allclose(leading(W, 4, exact=10).S.numpy(), wanted, rtol=1e-12)


# -- ranks ----------------------------------------------------------------------------------------


def test_effective_rank_counts_equal_values_and_forgets_small_ones() -> None:
    values = torch.ones(6, dtype=torch.float64)
    assert effective_rank(3 * values) == pytest.approx(6, rel=1e-12)
    assert effective_rank(torch.tensor([2.0, 1e-12], dtype=torch.float64)) == pytest.approx(1)
    assert effective_rank(torch.zeros(3)) == effective_rank(torch.zeros(0)) == 0
    p = np.array([4, 2, 1, 1]) / 8
    wanted = math.exp(-(p * np.log(p)).sum())
    assert effective_rank(torch.tensor([4.0, 2, 1, 1]).double()) == pytest.approx(wanted, rel=1e-12)


def test_energy_is_of_squares_and_rounding_is_no_rank() -> None:
    """σ = 4, 2, 1, 1: 90 % of σ² takes two; a fifth that is 1e-9 of the largest is none."""
    sigma = torch.tensor([4.0, 2, 1, 1, 4e-9], dtype=torch.float64)
    found = update(orthonormal(30, 5).t(), orthonormal(20, 5, 1) * sigma)
    figures = measure(5, found, torch.randn(20, 30))
    assert figures.rank_90 == 2
    assert figures.sigma == pytest.approx([4, 2, 1, 1], rel=1e-12)


def test_an_update_of_zeros_has_no_direction() -> None:
    found = directions(Update(2, Decomposed.of_product(torch.ones(2, 9), torch.zeros(7, 2))))
    assert found is None and directions(Update(0, None)) is None
    figures = measure(2, found, torch.ones(7, 9))
    assert (figures.update, figures.sigma, figures.amplification) == (0.0, [], None)
    assert figures.base == pytest.approx(math.sqrt(63))


def test_a_w0_of_zeros_is_amplified_by_nothing() -> None:
    figures = measure(2, update(orthonormal(9, 2).t(), orthonormal(7, 2)), torch.zeros(7, 9))
    assert (figures.projection, figures.amplification, figures.phi_input) == (0.0, None, None)
