"""The best B·A of a matrix, and where a spectrum is cut, beside torch's SVD and PEFT's rule."""

import pytest
import torch
from peft.tuners.lora.conversion import _find_cutoff_index

from dlora.errors import UsageError
from dlora.library.low_rank import Cut, Decomposed

SHAPES = [(40, 70), (70, 40), (33, 33)]


def matrix(shape: tuple[int, int], rank: int | None = None) -> torch.Tensor:
    torch.manual_seed(0)
    if rank is None:
        return torch.randn(shape)
    return torch.randn(shape[0], rank) @ torch.randn(rank, shape[1])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_is_the_energy_that_is_left_out_and_factors_are_balanced(shape) -> None:
    M, k = matrix(shape), 5
    low = Decomposed.of(M, "M").cut(k)
    U, S, Vt = torch.linalg.svd(M.double(), full_matrices=False)
    product = low.B.double() @ low.A.double()
    torch.testing.assert_close(product, (U[:, :k] * S[:k]) @ Vt[:k], rtol=0, atol=1e-5)
    left = S[k:].square().sum()
    torch.testing.assert_close((M - product).square().sum(), left, rtol=1e-6, atol=0)
    assert low.energy == pytest.approx(float(1 - left / S.square().sum()), rel=1e-9)
    root = S[:k].sqrt().float()
    torch.testing.assert_close(low.B.norm(dim=0), root, rtol=1e-5, atol=0)
    torch.testing.assert_close(low.A.norm(dim=1), root, rtol=1e-5, atol=0)
    assert (low.B.gather(0, low.B.abs().argmax(0, keepdim=True)) > 0).all()


def test_energy_counts_squares() -> None:
    squares = torch.tensor([4.0, 2.0, 1.0, 1.0], dtype=torch.float64).square()
    ranks = {energy: Cut(energy=energy).of(squares) for energy in (0.5, 0.72, 0.73, 0.9, 0.96, 1.0)}
    assert ranks == {0.5: 1, 0.72: 1, 0.73: 2, 0.9: 2, 0.96: 4, 1.0: 4}


@pytest.mark.parametrize("energy", [0.1, 0.5, 0.9, 0.99, 1.0])
def test_energy_cuts_where_peft_cuts(energy: float) -> None:
    S = torch.linalg.svdvals(matrix((40, 70)).double())
    assert Cut(energy=energy).of(S.square()) == _find_cutoff_index(S, energy)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_rank_that_is_not_there_is_not_made_of_rounding(shape) -> None:
    low = Decomposed.of(M := matrix(shape, rank=3), "M")
    assert Cut(rank=7).of(low.squares) == Cut(energy=1.0).of(low.squares) == 3
    cut = low.cut(3)
    assert (cut.B @ cut.A - M).norm() <= 1e-6 * M.norm()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_zeros_have_rank_1_and_lose_nothing(shape) -> None:
    found = Decomposed.of(torch.zeros(shape), "M")
    assert Cut(rank=7).of(found.squares) == Cut(energy=0.5).of(found.squares) == 1
    low = found.cut(1)
    assert low.energy == 1 and low.A.shape == (1, shape[1]) and low.B.shape == (shape[0], 1)
    assert not low.A.any() and not low.B.any()


def test_what_is_not_finite_is_named() -> None:
    with pytest.raises(UsageError, match="q_proj: contains NaN or infinite values"):
        Decomposed.of(torch.tensor([[1.0, float("nan")]]), "q_proj")
