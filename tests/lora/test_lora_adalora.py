"""The SVD form: its gradients, what it keeps for backward, and the pruned model that it shows."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from adalora_nets import LAYERS, adapted, data, net, randomize
from causal_models import causal_model, logits, relative_error
from masks import keep_mask
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from dlora import AdaLoraConfig, attach, disabled, merge, unmerge
from dlora.lora.adalora import orthogonality
from dlora.lora.attach import attachment_of, named_adapters
from dlora.lora.dropout import SampleKeys
from dlora.lora.states import AdapterState

N, M, R, ROWS, TOKENS, VOCABULARY = 5, 7, 3, 2, 4, 6
KEYS = SampleKeys(seed=0, step=3, ids=(11, 12), lengths=(4, 3))
HOSTS = {
    "linear": lambda: nn.Linear(N, M),
    "linear without bias": lambda: nn.Linear(N, M, bias=False),
    "conv1d": lambda: Conv1D(M, N),
    "embedding": lambda: nn.Embedding(VOCABULARY, M),
    "embedding with padding": lambda: nn.Embedding(VOCABULARY, M, padding_idx=2),
}


def host(kind: str, *, r: int = R, dropout: float = 0.0, dtype: Any = torch.float64) -> nn.Module:
    """One layer with random P, λ and Q of r triplets; α = 2·R, so s = 2 whatever r is."""
    torch.manual_seed(0)
    model = nn.Sequential(HOSTS[kind]()).to(dtype)
    settings = {"lora_alpha": 2 * R, "lora_dropout": dropout, "target_modules": ["0"]}
    attach(model, AdaLoraConfig(init_r=R, target_r=1, **settings))
    randomize(model)
    adapter = model[0].adapter
    if r < R:
        adapter.shrink(torch.arange(r))
        adapter.state = AdapterState.ON  # it would stand back, and there would be nothing to test
    return model


def inputs(kind: str) -> Tensor:
    if kind.startswith("embedding"):
        return torch.tensor([[2, 1, 2, 5], [0, 1, 2, 2]])
    return torch.randn(ROWS, TOKENS, N, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("r", [R, 1, 0])
@pytest.mark.parametrize("kind", HOSTS)
def test_layer_equals_plain_autograd(kind: str, r: int, dropout: float) -> None:
    model, x = host(kind, r=r, dropout=dropout), inputs(kind)
    base, adapter = model[0], model[0].adapter
    factors = list(adapter.parameters())
    A, B, E = adapter.lora_A, adapter.lora_B, adapter.lora_E
    with attachment_of(model).stream.keyed(KEYS):
        y = model(x)
        if kind.startswith("embedding"):
            low_rank = F.embedding(x, A.T, padding_idx=base.padding_idx)
            plain = F.embedding(x, base.weight)
        else:
            keep = keep_mask(adapter.stream, x, dropout, "0") if dropout else torch.ones_like(x)
            low_rank = x * keep / (1 - dropout) @ A.T
            plain = F.linear(x, base.weight.T if kind == "conv1d" else base.weight, base.bias)
    plain = plain + 2 * (low_rank * E.T) @ B.T
    torch.testing.assert_close(y, plain, rtol=1e-12, atol=1e-12)
    wanted = [*([x] if x.requires_grad else []), *factors]
    dy = torch.randn_like(y)
    ours, reference = (torch.autograd.grad(out, wanted, dy) for out in (y, plain))
    torch.testing.assert_close(ours, reference, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_it_starts_as_its_base_with_gaussian_factors(dtype: torch.dtype) -> None:
    model = adapted(net(dtype))
    x, _ = data(0, dtype)
    assert torch.equal(model(x), net(dtype)(x))
    for _, _, adapter in named_adapters(model):
        assert {p.dtype for p in adapter.parameters()} == {
            torch.float64 if dtype == torch.float64 else torch.float32
        }
        assert adapter.lora_E.shape == (6, 1) and not adapter.lora_E.any()
        for factor in (adapter.lora_A, adapter.lora_B):
            assert 0.015 < factor.std() < 0.025


# -- the regulariser ------------------------------------------------------------------------------


def norm_of(factor: Tensor, dim: int) -> Tensor:
    gram = factor @ factor.T if dim == 0 else factor.T @ factor
    return torch.linalg.matrix_norm(gram - torch.eye(len(gram), dtype=factor.dtype))


@pytest.mark.parametrize("weight", [1.0, 0.3, 7.0])
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("r", [1, 3, 5])
def test_its_gradient_is_autograd_s(r: int, dim: int, weight: float) -> None:
    torch.manual_seed(r)
    factor = torch.randn((r, 9) if dim == 0 else (9, r), dtype=torch.float64, requires_grad=True)
    reference = norm_of(factor, dim)
    (weight * reference).backward()
    there = torch.randn_like(factor)
    gradient = there.clone()
    norm = orthogonality.add_gradient(factor, dim, gradient, weight)
    torch.testing.assert_close(norm, reference.detach(), rtol=1e-13, atol=0)
    torch.testing.assert_close(gradient - there, factor.grad, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("dim", [0, 1])
def test_without_triplets_or_where_orthonormal_it_adds_zeros(dim: int) -> None:
    for factor in (torch.empty(0, 9), torch.eye(9)[:4]):
        given = factor if dim == 0 else factor.t().contiguous()
        gradient = torch.full_like(given, 3.0)
        assert orthogonality.add_gradient(given, dim, gradient, 0.5) == 0
        assert (gradient == 3.0).all()


# -- the pruned model -----------------------------------------------------------------------------


def pruned(model: nn.Module) -> dict[str, Tensor]:
    """Mask some triplets, as a mask does whose λ have grown again; the masks by path."""
    masks = {
        path: torch.tensor([i % 3 != k for i in range(adapter.r)])
        for k, (path, _, adapter) in enumerate(named_adapters(model))
    }
    for path, _, adapter in named_adapters(model):
        adapter.kept = masks[path]
    return masks


def test_eval_mode_sees_the_pruned_model_between_masks() -> None:
    model = randomize(adapted())
    x, _ = data(0)
    whole = model(x)
    masks = pruned(model)
    assert torch.equal(model.train()(x), whole)
    shown = model.eval()(x)
    reference = randomize(adapted())
    for path, _, adapter in named_adapters(reference):
        adapter.lora_E.data[~masks[path]] = 0
    assert torch.equal(shown, reference.train()(x))
    assert relative_error(shown, whole) > 0.01
    for path, _, adapter in named_adapters(model):
        assert adapter.lora_E.all()  # they may come back
        A, B, scaling = adapter.as_lora()
        assert len(A) == B.shape[1] == int(masks[path].sum())
        assert relative_error(scaling * B @ A, adapter.delta()) < 1e-6


def test_a_masked_model_merges_and_unmerges() -> None:
    model = randomize(adapted())
    pruned(model)
    x, _ = data(0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with disabled(model):
        assert torch.equal(model(x), net()(x))
    shown = model.eval()(x)
    merge(model)
    for mode in (True, False):  # merged is merged
        assert relative_error(model.train(mode)(x), shown) < 1e-6
    unmerge(model)
    assert torch.equal(model.eval()(x), shown)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_modules_that_have_no_triplet_left_stand_back() -> None:
    model = randomize(adapted())
    for path, _, adapter in named_adapters(model):
        adapter.shrink(torch.arange(0 if path == "l2" else 2))
    x, _ = data(0)
    y = model(x)
    y.sum().backward()
    assert model.l2.adapter.state is AdapterState.EMPTY and model.l1.adapter.lora_A.grad.any()
    assert model.l2.adapter.lora_A.grad is None
    plain = net()
    for path in ("l1", "l3"):
        adapter = getattr(model, path).adapter
        delta = adapter.lora_B * adapter.lora_E.view(-1) @ adapter.lora_A
        getattr(plain, path).weight.data += 2 * delta.detach()
    assert relative_error(y, plain(x)) < 1e-6
    assert relative_error(merge(model)(x), y) < 1e-6
    unmerge(model)
    assert relative_error(model(x), y) < 1e-6
    assert [len(getattr(model, path).adapter.lora_E) for path in LAYERS] == [2, 0, 2]


def test_all_hosts_of_a_language_model_merge() -> None:
    model = causal_model("gpt2").eval()
    targets = ["c_attn", "c_proj", "wte"]
    attach(model, AdaLoraConfig(init_r=4, target_r=2, target_modules=targets))
    randomize(model, std=0.3)
    with disabled(model):
        base = logits(model)
    pruned(model)
    shown = logits(model)
    assert relative_error(shown, base) > 0.1
    assert relative_error(logits(merge(model)), shown) < 1e-5
