"""Gradients of the layers against finite differences and plain autograd; what they keep alive."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from made_tensors import Allocations, saved_for_backward
from masks import keep_mask
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from dlora import AdaLoraConfig, LoraConfig, attach
from dlora.lora.attach import attachment_of
from dlora.lora.dropout import SampleKeys

N, M, R, ROWS, TOKENS = 5, 7, 3, 2, 4
KEYS = SampleKeys(seed=0, step=3, ids=(11, 12), lengths=(4, 3))


def host(kind: str, *, bias: bool = True, dropout: float = 0.0) -> nn.Sequential:
    """A float64 base of one layer with random A and B; α = 2r, so s = 2."""
    torch.manual_seed(0)
    base: nn.Module
    if kind == "conv1d":
        base = Conv1D(M, N)
        nn.init.normal_(base.bias)
    else:
        base = nn.Linear(N, M, bias=bias)
    model = nn.Sequential(base).double()
    attach(model, LoraConfig(r=R, lora_alpha=2 * R, lora_dropout=dropout))
    nn.init.normal_(model[0].adapter.lora_B)
    return model


@contextmanager
def keyed(model: nn.Module) -> Iterator[None]:
    with attachment_of(model).stream.keyed(KEYS):
        yield


LINEAR_HOSTS = {
    "linear": {"kind": "linear"},
    "linear without bias": {"kind": "linear", "bias": False},
    "conv1d": {"kind": "conv1d"},
}


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("case", LINEAR_HOSTS)
def test_layer_equals_plain_autograd(case: str, dropout: float) -> None:
    model = host(**LINEAR_HOSTS[case], dropout=dropout)
    base, adapter = model[0], model[0].adapter
    x = torch.randn(ROWS, TOKENS, N, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(ROWS, TOKENS, M, dtype=torch.float64)
    factors = [adapter.lora_A, adapter.lora_B]
    with keyed(model):
        y = model(x)
        keep = keep_mask(adapter.stream, x, dropout, "0") if dropout else torch.ones_like(x)
    ours = torch.autograd.grad(y, [x, *factors], dy)
    weight = base.weight.T if case == "conv1d" else base.weight
    dropped = x * keep / (1 - dropout)
    plain = F.linear(x, weight, base.bias) + 2 * dropped @ factors[0].T @ factors[1].T
    torch.testing.assert_close(y, plain, rtol=1e-12, atol=1e-12)
    reference = torch.autograd.grad(plain, [x, *factors], dy)
    torch.testing.assert_close(ours, reference, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("padding_idx", [None, 2])
def test_embedding_equals_plain_autograd(padding_idx: int | None) -> None:
    """The padding row takes part in forward and gets no gradient, as an `nn.Embedding`'s own."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(6, M, padding_idx=padding_idx)).double()
    attach(model, LoraConfig(r=R, lora_alpha=2 * R, target_modules=["0"]))
    A, B = model[0].adapter.lora_A, model[0].adapter.lora_B
    nn.init.normal_(A)
    ids = torch.tensor([[2, 1, 2, 5], [0, 1, 2, 2]])
    y, dy = model(ids), torch.randn(2, 4, M, dtype=torch.float64)
    low_rank = F.embedding(ids, A.T, padding_idx=padding_idx) @ B.T
    plain = F.embedding(ids, model[0].weight) + 2 * low_rank
    torch.testing.assert_close(y, plain, rtol=1e-12, atol=1e-12)
    ours, reference = (torch.autograd.grad(out, [A, B], dy) for out in (y, plain))
    torch.testing.assert_close(ours, reference, rtol=1e-12, atol=1e-12)
    assert ours[0][:, 2].any() == (padding_idx is None)


class Stack(nn.Module):
    """Two blocks of two adapted layers each."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        blocks = [nn.Sequential(nn.Linear(N, M), nn.GELU(), nn.Linear(M, N)) for _ in range(2)]
        self.blocks = nn.ModuleList(blocks)
        attach(self, LoraConfig(r=R, lora_dropout=dropout))
        for name, parameter in self.named_parameters():
            if name.endswith("lora_B"):
                nn.init.normal_(parameter)

    def gradients(
        self, run: Callable[[nn.Module, Tensor], Tensor], use_keys: bool
    ) -> dict[str, Tensor]:
        self.zero_grad()
        torch.manual_seed(1)
        x = torch.randn(ROWS, TOKENS, N, requires_grad=True)
        with attachment_of(self).stream.keyed(KEYS if use_keys else None):  # type: ignore[arg-type]
            h = x
            for block in self.blocks:
                h = run(block, h)
            h.square().sum().backward()
        found = {name: p.grad for name, p in self.named_parameters() if p.grad is not None}
        return {**found, "x": x.grad}


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("use_keys", [True, False], ids=["keyed", "unkeyed"])
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_activation_checkpointing_changes_no_bit(
    reentrant: bool, use_keys: bool, dropout: float
) -> None:
    model = Stack(dropout)

    def recomputed(block: nn.Module, h: Tensor) -> Any:
        return checkpoint(block, h, use_reentrant=reentrant)

    plain = model.gradients(lambda block, h: block(h), use_keys)
    again = model.gradients(recomputed, use_keys)
    assert len(plain) == 9  # A and B of four layers, and x
    assert plain.keys() == again.keys()
    assert all(torch.equal(plain[name], again[name]) for name in plain)


@pytest.mark.parametrize(
    "config", [LoraConfig(r=R), AdaLoraConfig(init_r=R, target_r=R)], ids=lambda c: c.method
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_backward_keeps_x_once_and_one_z_for_each_layer(
    dtype: torch.dtype, config: LoraConfig
) -> None:
    """Three projections of one x, as in attention: x is not kept three times, nothing is upcast,
    and of AdaLoRA there is no product with λ.
    """
    model = nn.ModuleList([nn.Linear(N, M), nn.Linear(N, M, bias=False), Conv1D(M, N)]).to(dtype)
    attach(model, config)
    x = torch.randn(ROWS, TOKENS, N, dtype=dtype, requires_grad=True)
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = saved_for_backward(lambda: sum(layer(x) for layer in model), parameters)
    assert x.untyped_storage().data_ptr() in {t.untyped_storage().data_ptr() for t in kept}
    shapes = sorted(tuple(t.shape) for t in kept)
    assert shapes == sorted([(ROWS * TOKENS, N), *[(ROWS * TOKENS, R)] * 3])
    assert {t.dtype for t in kept} == {dtype}


def test_forward_allocates_the_output_and_z_backward_the_gradients() -> None:
    """No second tensor of the size of the output, no ΔW, no product of the size of x twice."""
    tokens, n, m = 13, 17, 29
    model = nn.Sequential(nn.Linear(n, m))
    attach(model, LoraConfig(r=R))
    x, dy = torch.randn(tokens, n, requires_grad=True), torch.randn(tokens, m)
    with Allocations(x, *model.parameters()) as forward:
        y = model(x)
    assert forward.numels() == [tokens * R, tokens * m]
    with Allocations(x, y, dy, *model.parameters()) as backward:
        y.backward(dy)
    # dyB, dA, dB, dx; the engine may copy a gradient when it stores it
    assert set(backward.numels()) == {tokens * R, R * n, m * R, tokens * n}
    assert backward.numels().count(tokens * n) == 1


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_a_bfloat16_base_is_never_upcast(kind: str) -> None:
    base = Conv1D(29, 17) if kind == "conv1d" else nn.Linear(17, 29)
    model = nn.Sequential(base).to(torch.bfloat16)
    attach(model, LoraConfig(r=R))
    x = torch.randn(13, 17, dtype=torch.bfloat16, requires_grad=True)
    with Allocations(x, *model.parameters()) as allocations:
        model(x).sum().backward()
    assert 17 * 29 not in allocations.numels()


@pytest.mark.parametrize("shape", [(N,), (0, N), (ROWS, 0, N), (TOKENS, N), (1, ROWS, TOKENS, N)])
def test_inputs_of_any_shape(shape: tuple[int, ...]) -> None:
    """No tokens at all too: an expert to which nothing was routed."""
    model = host("linear")
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    y = model(x)
    assert y.shape == (*shape[:-1], M)
    y.sum().backward()
    assert x.grad.shape == shape
    assert model[0].adapter.lora_B.grad.shape == (M, R)


def test_a_transposed_input_is_read_in_its_own_order() -> None:
    model = host("linear")
    x = torch.randn(TOKENS, ROWS, N, dtype=torch.float64).transpose(0, 1)
    torch.testing.assert_close(model(x), model(x.contiguous()), rtol=0, atol=0)
