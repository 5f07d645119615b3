"""The golden example of methods.md, section 18: exact rationals, not results of this code."""

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from dlora import LoraConfig, attach

W0 = [[1, 0, -1, 2, 0.5], [0, 1, 0, -1, 1], [0.5, -0.5, 1, 0, 0], [1.5, 0, 0, 1, -0.5]]
A = [[0.2, -0.1, 0, 0.3, -0.2], [0, 0.1, 0.4, -0.2, 0.1]]
B = [[0.5, 0.1], [-0.3, 0.2], [0, -0.4], [0.2, 0.3]]
X = [1, -1, 0.5, 0, 2]
Y = [1.34, 1.72, 0.54, 1.06]
MERGED = [
    [1.8, -0.32, -0.68, 3.04, -0.22],
    [-0.48, 1.4, 0.64, -2.04, 1.64],
    [0.5, -0.82, -0.28, 0.64, -0.32],
    [1.82, 0.08, 0.96, 1, -0.58],
]
HALF_SQUARE = {
    "lora_A": [[2.928, -2.928, 1.464, 0, 5.856], [4.64, -4.64, 2.32, 0, 9.28]],
    "lora_B": [[-1.072, 3.216], [-1.376, 4.128], [-0.432, 1.296], [-0.848, 2.544]],
}
SUM = {
    "lora_A": [[3.2, -3.2, 1.6, 0, 6.4], [1.6, -1.6, 0.8, 0, 3.2]],
    "lora_B": [[-0.8, 2.4]] * 4,
    "x": [3.64, 0.34, 0.64, 2.64, 0.52],
}
LOSSES = {
    "half square": (lambda y: y.square().sum() / 2, HALF_SQUARE),
    "sum": (lambda y: y.sum(), SUM),
}
RSLORA_Y = [1.27372583, 2.01823376, 0.14235498, 1.29195959]
EXACT = {torch.float64: 1e-12, torch.float32: 1e-6}
NINE_DIGITS = {torch.float64: 2.5e-9, torch.float32: 1e-6}  # the table has 8 decimals


def layer(stored: str, dtype: torch.dtype, **settings: object) -> nn.Sequential:
    """The example's W0 in a Linear or, transposed, in a Conv1D; its A and B attached."""
    base = nn.Linear(5, 4, bias=False) if stored == "linear" else Conv1D(4, 5)
    model = nn.Sequential(base).to(dtype)
    weight = torch.tensor(W0, dtype=dtype)
    with torch.no_grad():
        base.weight.copy_(weight if stored == "linear" else weight.T)
        if stored == "conv1d":
            base.bias.zero_()
        attach(model, LoraConfig(r=2, lora_alpha=16, **settings))
        base.adapter.lora_A.copy_(torch.tensor(A, dtype=dtype))
        base.adapter.lora_B.copy_(torch.tensor(B, dtype=dtype))
    return model


def assert_is(value: Tensor, expected: list, tolerance: float) -> None:
    wanted = torch.tensor(expected, dtype=torch.float64)
    assert (value.double() - wanted).abs().max() <= tolerance * wanted.abs().max(), value


@pytest.mark.parametrize("dtype", EXACT, ids=str)
@pytest.mark.parametrize("stored", ["linear", "conv1d"])
@pytest.mark.parametrize("loss", LOSSES)
def test_lora_is_the_golden_example(loss: str, stored: str, dtype: torch.dtype) -> None:
    model, tolerance = layer(stored, dtype), EXACT[dtype]
    x = torch.tensor(X, dtype=dtype, requires_grad=True)
    y = model(x)
    assert_is(y, Y, tolerance)
    compute, gradients = LOSSES[loss]
    compute(y).backward()
    actual = {"x": x.grad, "lora_A": model[0].adapter.lora_A.grad}
    actual["lora_B"] = model[0].adapter.lora_B.grad
    for name, expected in gradients.items():
        assert actual[name].dtype == dtype
        assert_is(actual[name], expected, tolerance)


@pytest.mark.parametrize("dtype", EXACT, ids=str)
def test_delta_is_the_golden_update(dtype: torch.dtype) -> None:
    model = layer("linear", dtype)
    assert_is(model[0].weight + model[0].adapter.delta(), MERGED, EXACT[dtype])
    assert abs(float(model[0].adapter.delta().double().norm()) - 2.832948994) < 3e-7


@pytest.mark.parametrize("dtype", NINE_DIGITS, ids=str)
def test_rslora_is_the_golden_example(dtype: torch.dtype) -> None:
    model = layer("linear", dtype, use_rslora=True)
    assert abs(model[0].adapter.scaling - 11.313708499) < 1e-9
    assert_is(model(torch.tensor(X, dtype=dtype)), RSLORA_Y, NINE_DIGITS[dtype])


@pytest.mark.parametrize(
    ("r", "scale"), [(1, 16.0), (2, 11.313708499), (3, 9.237604307), (64, 2.0)]
)
def test_rslora_scales_by_the_root_of_r(r: int, scale: float) -> None:
    assert LoraConfig(r=r, lora_alpha=16, use_rslora=True).scaling_for("x") == pytest.approx(scale)
    assert LoraConfig(r=r, lora_alpha=16).scaling_for("x") == 16 / r


def test_a_fresh_adapter_changes_nothing_and_has_the_published_spread() -> None:
    torch.manual_seed(0)
    n, r = 400, 64
    model = nn.Sequential(nn.Linear(n, 8), nn.Embedding(n, 8))
    x = torch.randn(5, n)
    before = model[0](x)
    attach(model, LoraConfig(r=r, target_modules=["0", "1"]))
    assert torch.equal(model[0](x), before)
    linear, table = model[0].adapter, model[1].adapter
    assert linear.lora_A.abs().max() <= n**-0.5
    assert linear.lora_A.detach().std() == pytest.approx((3 * n) ** -0.5, rel=0.02)
    assert not linear.lora_B.any() and not table.lora_A.any()
    assert table.lora_B.detach().std() == pytest.approx(1, rel=0.1)
