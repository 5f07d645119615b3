"""Masters of A and B in float32 beside a base of any dtype, and a base that nothing touches."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from calls import Calls
from causal_models import causal_model, token_ids
from fake_cuda import fake_cuda
from torch import Tensor, nn
from torch.nn.grad import conv2d_input, conv2d_weight

from dlora import LoraConfig, attach
from dlora.lora.attach import trainable_parameters
from dlora.lora.functional import summed
from dlora.lora.functional_dora import excess, row_norms
from dlora.lora.low_rank_weight import LowRankWeight

NAMES = {
    "llama": ["q_proj", "down_proj", "embed_tokens", "lm_head"],
    "gpt2": ["c_attn", "c_proj", "wte", "lm_head"],
}
MASTERS = {
    torch.bfloat16: torch.float32,
    torch.float16: torch.float32,
    torch.float32: torch.float32,
    torch.float64: torch.float64,
}


@pytest.mark.parametrize(("base", "master"), MASTERS.items(), ids=str)
def test_a_and_b_are_float32_or_the_base_s_float64(base: torch.dtype, master: torch.dtype) -> None:
    model = causal_model("llama", base)
    attach(model, LoraConfig(r=2, target_modules=NAMES["llama"], modules_to_save=["model.norm"]))
    assert {p.dtype for p in trainable_parameters(model).values()} == {master}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {base}
    assert model(token_ids()).logits.dtype == base


@pytest.mark.parametrize("kind", NAMES)
def test_small_steps_beside_a_bfloat16_base_move_every_tensor(kind: str) -> None:
    """At lr 2.5e-5 an A in bfloat16 would stay where it is: its values are 1,000 times the step."""
    model = causal_model(kind, torch.bfloat16)
    attach(model, LoraConfig(r=4, target_modules=NAMES[kind]))
    trained = trainable_parameters(model)
    start = {name: p.detach().clone() for name, p in trained.items()}
    base = {n: p.detach().clone() for n, p in model.named_parameters() if n not in trained}
    optimizer = torch.optim.AdamW(trained.values(), lr=2.5e-5, weight_decay=0.0, fused=True)
    for step in range(4):
        ids = token_ids(seed=step)
        model(ids, labels=ids).loss.backward()
        assert {p.grad.dtype for p in trained.values()} == {torch.float32}
        optimizer.step()
        optimizer.zero_grad()
    assert len(trained) == 2 * len(model.dlora.adapted) > 0
    assert [name for name, p in trained.items() if torch.equal(p, start[name])] == []
    # In every A the elements move, not a few of them (of a table, the rows that occurred).
    projections = [n for n in trained if n.endswith("proj.adapter.lora_A")]
    moved = [(trained[n] != start[n]).float().mean() for n in projections]
    assert min(moved) > 0.9
    for name, p in model.named_parameters():
        if name in base:
            assert p.dtype == torch.bfloat16 and p.grad is None
            assert torch.equal(p, base[name]), name


def test_attaching_keeps_the_base_s_names_storage_and_bits() -> None:
    model = causal_model("tied", torch.bfloat16)
    before = {n: (p, p.data_ptr(), p.detach().clone()) for n, p in model.named_parameters()}
    attach(model, LoraConfig(r=2, target_modules=NAMES["llama"], modules_to_save=["model.norm"]))
    after = {n: p for n, p in model.named_parameters() if n not in trainable_parameters(model)}
    assert after.keys() == before.keys()
    for name, (parameter, address, value) in before.items():
        assert after[name] is parameter and parameter.data_ptr() == address
        assert torch.equal(parameter, value) and not parameter.requires_grad
    assert model.lm_head.weight is model.model.embed_tokens.weight  # still tied


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gradients_are_summed_in_float32(dtype: torch.dtype, use_dora: bool) -> None:
    """Over 600 tokens: beside float64 sums of the same factors the error is float32's."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(700, 8, bias=False, dtype=dtype))
    attach(model, LoraConfig(r=4, lora_alpha=6, use_dora=use_dora))
    A, B = model[0].adapter.lora_A, model[0].adapter.lora_B
    nn.init.normal_(B)
    x, dy = torch.randn(600, 700).to(dtype), torch.randn(600, 8).to(dtype)
    adapter, weight, y = model[0].adapter, model[0].weight, model(x)
    magnitudes = [adapter.lora_magnitude_vector] if use_dora else []
    found = torch.autograd.grad(y, [A, B, *magnitudes], dy)
    of_magnitudes = [(dy * y.detach()).double().sum(0) / mu.detach() for mu in magnitudes]
    if use_dora:  # dy through the rows' scale, in dtype
        norms = row_norms(weight, A, B, 1.5, adapter.base_squares)
        e = excess(adapter.lora_magnitude_vector, norms, dtype).detach()
        dy = torch.addcmul(dy, dy, e)
    z, dyB = x @ A.to(dtype).t(), dy @ B.to(dtype)
    wanted = [1.5 * dyB.double().t() @ x.double(), 1.5 * dy.double().t() @ z.double()]
    for got, correct in zip(found, wanted + of_magnitudes, strict=True):
        assert got.dtype == torch.float32
        assert float((got - correct).norm() / correct.norm()) < 1e-6


def test_on_a_gpu_one_product_sums_in_float32() -> None:
    with fake_cuda() as device, Calls() as calls:
        factors = [torch.empty(20, n, dtype=torch.bfloat16, device=device) for n in (4, 6)]
        found = summed(*factors, torch.float32, 2.0)
    assert (found.dtype, found.device, found.shape) == (torch.float32, device, (4, 6))
    assert calls["aten.addmm.dtype_out"] == 1 and not calls["aten._to_copy.default"]


def close_to(found: Any, wanted: list[Tensor]) -> None:
    """Gradients that a product in the dtype of x would have rounded to 8 bits."""
    for got, correct in zip(found, wanted, strict=True):
        assert got.dtype == torch.float32
        assert float((got - correct).norm() / correct.norm()) < 1e-6


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last], ids=str)
def test_a_convolution_s_gradients_are_summed_in_float32(memory: torch.memory_format) -> None:
    """dy and B are small integers, so that B transposed times dy is exact in bfloat16."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 8, 3, stride=2, bias=False, dtype=torch.bfloat16))
    attach(model, LoraConfig(r=3, lora_alpha=4.5, target_modules=["0"]))
    A, B = model[0].adapter.lora_A, model[0].adapter.lora_B
    B.data = torch.randint(-1, 2, B.shape).float()
    x = torch.randn(5, 4, 31, 31).bfloat16().to(memory_format=memory).requires_grad_()
    dy = torch.randint(-1, 2, (5, 8, 15, 15)).bfloat16()
    *found, dx = torch.autograd.grad(model(x), [A, B, x], dy)
    kernel = A.detach().view(3, 4, 3, 3)
    z = F.conv2d(x.detach(), kernel.bfloat16(), stride=2)
    dz = 1.5 * torch.einsum("mr,nmhw->nrhw", B.detach(), dy.float())
    dA = conv2d_weight(x.detach().double(), kernel.shape, dz.double(), stride=2)
    dB = 1.5 * torch.einsum("nmhw,nrhw->mr", dy.double(), z.double())
    close_to(found, [dA.reshape(A.shape), dB])
    W = model[0].weight.double() + 1.5 * (B.double() @ A.double()).view(8, 4, 3, 3)
    wanted = conv2d_input(x.shape, W.detach(), dy.double(), stride=2)
    assert float((dx - wanted).norm() / wanted.norm()) < 1e-2


@pytest.mark.parametrize("side", ["x W", "W x"])
def test_a_parameter_s_gradients_are_summed_in_float32(side: str) -> None:
    """As experts multiply that are stacked; the factor next to dy is of small integers."""
    torch.manual_seed(0)
    near = torch.randint(-1, 2, (2, 3, 8)).float().requires_grad_()
    far = torch.randn(2, 6, 3).requires_grad_()
    W0, x = torch.zeros(2, 6, 8).bfloat16(), torch.randn(2, 500, 6).bfloat16()
    dy = torch.randint(-1, 2, (2, 500, 8)).bfloat16()
    if side == "x W":
        y = torch.bmm(x, LowRankWeight(W0, far, near, 1.5))  # type: ignore[arg-type]
    else:
        weight = LowRankWeight(W0.mT, near.mT, far.mT, 1.5)
        y = torch.bmm(weight, x.mT).mT  # type: ignore[arg-type]
    found = torch.autograd.grad(y, [far, near], dy)
    z = torch.bmm(x, far.detach().bfloat16())
    dz = 1.5 * dy.double() @ near.detach().double().mT
    close_to(found, [x.double().mT @ dz, 1.5 * z.double().mT @ dy.double()])
