"""LoRA-Pro's closed form against brute force: least squares over all updates of A and B at once."""

from typing import Any

import golden as example
import pytest
import torch
from least_squares import best
from torch import Tensor

from dlora.lora.lora_pro import Frame, equivalent, grams, seen

SHAPES = [(7, 5, 2), (5, 9, 3), (4, 4, 4), (6, 3, 3), (40, 30, 8)]  # m, n, r
SCALES = [0.5, 2.0, 5.657]

# methods.md, section 18: exact rationals.
GOLDEN_X = [[0.008693032783, -0.033698623909], [0.023146429082, -0.123466811933]]
GOLDEN_A = [
    [0.092321566, -0.094822125, 0.031812030, 0.009347635, 0.176057450],
    [0.231198793, -0.241230831, 0.063898029, 0.031637291, 0.436163046],
]
GOLDEN_B = [
    [0.009140677, 0.171412521],
    [0.029226400, 0.295813756],
    [0.034358223, 0.176510136],
    [-0.001315463, 0.110083420],
]


def drawn(m: int, n: int, r: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """A, B and G in float64."""
    draw = torch.Generator().manual_seed(seed)
    shapes = [(r, n), (m, r), (m, n)]
    A, B, G = (torch.randn(shape, generator=draw, dtype=torch.float64) for shape in shapes)
    return A, B, G


def check_close(got: Any, expected: Any, tolerance: float = 1e-9) -> None:
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def framed(A: Tensor, B: Tensor, s: float) -> Frame:
    return Frame(A, B, s, *grams([A, B.t()]))


@pytest.mark.parametrize("s", SCALES)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_closed_form_is_the_least_squares_solution(
    shape: tuple[int, int, int], s: float
) -> None:
    A, B, G = drawn(*shape)
    check_close(framed(A, B, s).balanced(*seen(A, B, G, s)), best(A, B, G, s))


@pytest.mark.parametrize("s", SCALES)
@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_left_of_g(shape: tuple[int, int, int], s: float) -> None:
    """T1: G − g̃ = (1 − P_B)·G·(1 − P_A)."""
    A, B, G = drawn(*shape)
    for update in (framed(A, B, s).balanced, framed(A, B, s).nearest):
        left = G - equivalent(A, B, *update(*seen(A, B, G, s)), s)
        P_B, P_A = B @ torch.linalg.pinv(B), torch.linalg.pinv(A) @ A
        expected = (torch.eye(len(P_B)) - P_B) @ G @ (torch.eye(len(P_A)) - P_A)
        assert float((left - expected).abs().max()) < 1e-10


def test_the_golden_example() -> None:
    """T2."""
    x, a, b, w0 = (
        torch.tensor(v, dtype=torch.float64) for v in (example.X, example.A, example.B, example.W0)
    )
    G = torch.outer((w0 + 8 * b @ a) @ x, x)
    frame, g = framed(a, b, 8.0), seen(a, b, G, 8.0)
    h_A, h_B = frame.balanced(*g)
    found = (h_A - frame.nearest(*g)[0]) @ torch.linalg.pinv(a)
    for got, golden in ((h_A, GOLDEN_A), (h_B, GOLDEN_B), (found, GOLDEN_X)):
        expected = torch.tensor(golden, dtype=torch.float64)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-9)
    assert float(G.norm()) == pytest.approx(6.209468576, abs=1e-9)
    for update, golden in (((h_A, h_B), 5.322275683), (g, 71.281130109)):
        assert float((G - equivalent(a, b, *update, 8.0)).norm()) == pytest.approx(golden, abs=1e-9)


@pytest.mark.parametrize("shape", SHAPES)
def test_no_x_changes_what_w_does(shape: tuple[int, int, int]) -> None:
    """T3."""
    A, B, G = drawn(*shape)
    h_A, h_B = framed(A, B, 2.0).nearest(*seen(A, B, G, 2.0))
    X = torch.randn(len(A), len(A), dtype=torch.float64)
    one = equivalent(A, B, h_A, h_B, 2.0)
    other = equivalent(A, B, h_A + X @ A, h_B - B @ X, 2.0)
    torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("s", SCALES)
@pytest.mark.parametrize("seed", range(5))
def test_it_is_nearer_than_plain_lora_and_goes_down(s: float, seed: int) -> None:
    """T4, and ⟨g_A, h_A⟩ + ⟨g_B, h_B⟩ = ‖g̃‖²."""
    A, B, G = drawn(12, 9, 3, seed)
    g_A, g_B = seen(A, B, G, s)
    h_A, h_B = framed(A, B, s).balanced(g_A, g_B)
    g = equivalent(A, B, h_A, h_B, s)
    assert (g - G).norm() <= (equivalent(A, B, g_A, g_B, s) - G).norm()
    down = (g_A * h_A).sum() + (g_B * h_B).sum()
    torch.testing.assert_close(down, g.square().sum(), rtol=1e-10, atol=0)


def test_an_invertible_pair_moves_w_as_full_fine_tuning_does() -> None:
    """T5: with r = m = n, g̃ = G, and a step of SGD differs by η²·s·h_B·h_A."""
    A, B, G = drawn(6, 6, 6)
    s = 1.5
    h_A, h_B = framed(A, B, s).balanced(*seen(A, B, G, s))
    torch.testing.assert_close(equivalent(A, B, h_A, h_B, s), G, rtol=1e-9, atol=1e-9)
    for eta in (1e-2, 1e-3):
        moved = s * (B - eta * h_B) @ (A - eta * h_A) - s * B @ A
        torch.testing.assert_close(moved + eta * G, eta**2 * s * h_B @ h_A, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("zero", ["A", "B"])
def test_a_factor_that_is_zero(zero: str) -> None:
    """T6: as at the start of a linear layer (B = 0) or of an embedding (A = 0)."""
    A, B, G = drawn(7, 5, 2)
    (A if zero == "A" else B).zero_()
    check_close(framed(A, B, 2.0).balanced(*seen(A, B, G, 2.0)), best(A, B, G, 2.0), 1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_lost_directions_are_left_alone(dtype: torch.dtype) -> None:
    """A row of A and a column of B that are zero: the pair of lower rank decides."""
    A, B, G = (t.to(dtype) for t in drawn(7, 5, 3))
    A[1], B[:, 2] = 0, 0
    expected = best(A.double(), B.double(), G.double(), 2.0)
    got = framed(A, B, 2.0).balanced(*seen(A, B, G, 2.0))
    check_close(got, expected, 1e-4 if dtype == torch.float32 else 1e-8)


def test_noise_is_not_amplified_without_bound() -> None:
    """A direction of B that is 1e-6 of the largest, and a gradient with the noise of bf16."""
    A, B, G = drawn(50, 40, 4)
    U, S, V = torch.linalg.svd(B, full_matrices=False)
    S[-1] = 1e-6 * S[0]
    B = U @ torch.diag(S) @ V
    g_A, g_B = (g.bfloat16().double() for g in seen(A, B, G, 2.0))
    h_A, _ = framed(A, B, 2.0).balanced(g_A, g_B)
    assert h_A.norm() < 2e3 * G.norm() / (2.0 * S[0])  # by 1e6 without the clamp


def test_pairs_of_several_ranks_are_factorised_together() -> None:
    drawn_pairs = [drawn(7, 5, r, seed=r) for r in (2, 3, 2, 1)]
    together = grams([factor for A, B, _ in drawn_pairs for factor in (A, B.t())])
    for i, (A, B, G) in enumerate(drawn_pairs):
        frame = Frame(A, B, 2.0, *together[2 * i : 2 * i + 2])
        got = frame.balanced(*seen(A, B, G, 2.0))
        check_close(got, best(A, B, G, 2.0))
