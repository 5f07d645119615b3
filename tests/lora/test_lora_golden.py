"""LoRA against the golden example of methods.md, section 18."""

import pytest
import torch
from golden import HALF_SQUARE, MERGED, X, Y, assert_is, layer
from torch import nn

from dlora import LoraConfig, attach

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
