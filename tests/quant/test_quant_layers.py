"""Layers with packed weights against plain layers that hold what the packed weight stands for."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from causal_models import causal_model, relative_error
from peft import PeftModel
from refusals import refusal
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D

from dlora import LoraConfig, UsageError, attach, disabled, merge, quantize, save_adapter, unmerge
from dlora.lora.attach import named_adapters
from dlora.quant.formats import FORMATS
from dlora.quant.linear import CODES, SCALES, is_packed, pack, unpacked

FLOATS = [torch.float32, torch.bfloat16, torch.float64]
SIZES = {"hidden_size": 64, "intermediate_size": 128}


def layer(kind: str, dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    made = Conv1D(128, 64) if kind == "conv1d" else nn.Linear(64, 128, bias=kind == "linear")
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(0, 0.1)
    return made.to(dtype).requires_grad_(False)


def twins(kind: str, name: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """A packed layer, and a plain one that holds its values."""
    packed = layer(kind, dtype)
    plain = copy.deepcopy(packed)
    pack(packed, name, transposed=kind == "conv1d")
    plain.weight.data = unpacked(packed)
    return packed, plain


def randomized(model: nn.Module) -> nn.Module:
    """With A and B that are not zero, the same ones in equal models."""
    torch.manual_seed(1)
    for _, _, adapter in named_adapters(model):
        for factor in (adapter.lora_A, adapter.lora_B):
            factor.data.normal_(0, 0.1)
    return model


def passes(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Output, gradient to the input, and to everything that is trained."""
    x = x.clone().requires_grad_()
    y = model(x)
    y.backward(torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape))
    assert x.grad is not None
    return [y.detach(), x.grad, *(p.grad for p in model.parameters() if p.grad is not None)]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("kind", ["linear", "without bias", "conv1d"])
def test_a_packed_layer_is_the_plain_one(kind: str, name: str, dtype: torch.dtype) -> None:
    packed, plain = twins(kind, name, dtype)
    names = ["weight_codes", "weight_scales", "bias"]
    assert [n for n, _ in packed.named_parameters()] == names[: 2 if packed.bias is None else 3]
    x = torch.randn(2, 3, 64).to(dtype)
    got = passes(packed, x)
    assert same(got, passes(plain, x)) and len(got) == 2
    with torch.no_grad():
        assert torch.equal(packed(x[0, 0]), plain(x[0, 0]))


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_adapters_beside_a_packed_weight(
    kind: str, name: str, dtype: torch.dtype, dropout: float
) -> None:
    """Output and gradients of A and B are those of LoRA on the values, bit for bit."""
    results = []
    for inner in twins(kind, name, dtype):
        model = nn.Sequential(inner)
        attach(model, LoraConfig(r=4, lora_dropout=dropout, target_modules=["0"]))
        randomized(model).train()
        torch.manual_seed(2)
        results.append(passes(model, torch.randn(2, 3, 64).to(dtype)))
    assert same(*results) and len(results[0]) == 4


@pytest.mark.parametrize("adapted", [False, True])
def test_autocast(adapted: bool) -> None:
    results = []
    for inner in twins("linear", "nf4", torch.float32):
        model = nn.Sequential(inner)
        if adapted:
            attach(model, LoraConfig(r=4, target_modules=["0"]))
            randomized(model)
        with torch.autocast("cpu", torch.bfloat16):
            results.append(passes(model, torch.randn(2, 64, generator=torch.Generator())))
        assert results[-1][0].dtype == torch.bfloat16
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("adapted", [False, True])
def test_nothing_that_was_unpacked_is_kept(adapted: bool) -> None:
    """Backward keeps the parameters themselves, which an engine frees and gathers again."""
    packed, _ = twins("linear", "nf4", torch.float32)
    model = nn.Sequential(packed)
    if adapted:
        attach(model, LoraConfig(r=4, target_modules=["0"]))
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = model(torch.randn(5, 64, requires_grad=True))
    for name in (CODES, SCALES):
        assert any(tensor is packed.get_parameter(name) for tensor in kept)
    own = {id(p) for p in model.parameters()}
    assert sum(t.numel() for t in kept if id(t) not in own) <= 5 * (64 + 4)  # x and x Aᵀ
    y.sum().backward()


def test_quantize_takes_the_linear_layers_of_the_blocks() -> None:
    model = causal_model("llama", **SIZES)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    done = quantize(model, "nf4")
    packed = [n.removesuffix(".weight") for n in before if "proj" in n]
    assert list(done.packed) == packed and len(packed) == 14
    assert done.left == {}
    after = dict(model.named_parameters())
    for name, parameter in before.items():
        path = name.removesuffix(".weight")
        if path in packed:
            codes, scales = after.pop(f"{path}.weight_codes"), after.pop(f"{path}.weight_scales")
            assert torch.equal(codes, FORMATS["nf4"].codes(parameter))
            assert torch.equal(scales, FORMATS["nf4"].scales(parameter))
        else:
            assert torch.equal(after.pop(name), parameter)
    assert after == {}
    weights = sum(p.numel() for n, p in before.items() if "proj" in n)
    assert str(done) == (
        f"nf4: 14 linear layers are packed, {weights / 1e6:.1f} M weights in "
        f"{weights * 4.25 / 8 / 1e6:.1f} MB (4.25 bits each)"
    )


def test_what_does_not_divide_stays_and_is_said() -> None:
    model = causal_model("llama", hidden_size=64, intermediate_size=72)
    done = quantize(model, "nf4")
    left = [f"model.layers.{i}.mlp.down_proj" for i in range(2)]
    assert list(done.left) == left and len(done.packed) == 12
    assert all(type(model.get_submodule(path)) is nn.Linear for path in left)
    assert str(done).endswith(
        "; not packed: model.layers.0.mlp.down_proj and 1 more (its rows have 72 weights, not a "
        "multiple of the block size 64)"
    )
    assert quantize(causal_model("llama", intermediate_size=72), "int8").left == {}


def test_stacked_experts_stay_and_are_said() -> None:
    done = quantize(causal_model("mixtral", **SIZES), "nf4")
    assert len(done.packed) == 8  # of attention
    assert "model.layers.0.mlp.experts.gate_up_proj and 3 more (it is not the weight of a" in str(
        done
    )


class Attention(nn.Module):
    """Two alike blocks whose attention reads its weights past its layers' forward."""

    def __init__(self) -> None:
        super().__init__()
        make = nn.TransformerEncoderLayer
        self.blocks = nn.ModuleList(make(64, 2, 128, batch_first=True) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def test_attention_kernels_keep_their_weights() -> None:
    model = Attention().requires_grad_(False)
    done = quantize(model, "nf4")
    assert [p for p in done.packed if p.startswith("blocks.0")] == [
        "blocks.0.linear1",
        "blocks.0.linear2",
    ]
    kept = [m for m in model.modules() if isinstance(m, NonDynamicallyQuantizableLinear)]
    assert len(kept) == 2 and not any(map(is_packed, kept))
    assert model.train()(torch.randn(1, 3, 64)).shape == (1, 3, 64)


@pytest.mark.parametrize(
    ("name", "before", "told"),
    [
        ("nf3", lambda model: None, "quantization: 'nf3' is unknown; expected one of fp8, int8"),
        (
            "nf4",
            lambda model: attach(model, LoraConfig()),
            "quantize: this model already has adapters",
        ),
        ("nf4", lambda model: quantize(model, "int8"), "quantize: this model is already packed"),
    ],
)
def test_a_mistake_is_one_line(name: str, before: Any, told: str) -> None:
    model = causal_model("llama", **SIZES)
    before(model)
    assert refusal(quantize, model, name).startswith(told)


def test_a_model_that_cannot_be_packed_is_refused() -> None:
    with pytest.raises(UsageError, match="quantization: nf4 cannot act .* rows have 24 weights"):
        quantize(causal_model("llama"), "nf4")


def test_a_packed_module_cannot_be_trained_whole() -> None:
    model = causal_model("llama", **SIZES)
    quantize(model, "nf4")
    with pytest.raises(UsageError, match="modules_to_save: the weight of model.layers.0.mlp.*pack"):
        attach(model, LoraConfig(modules_to_save=["mlp"]))
    attach(model, LoraConfig(modules_to_save=["lm_head"]))


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_merge_gives_whole_weights_and_unmerge_the_packed_ones(kind: str, name: str) -> None:
    """Into the dtype that the weights had, and never packed again."""
    sizes = {"n_embd": 64} if kind == "gpt2" else SIZES
    model = causal_model(kind, torch.bfloat16, **sizes).eval()
    quantize(model, name)
    attach(model, LoraConfig(r=4, lora_alpha=8))
    randomized(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    ids = torch.arange(10).view(2, 5)
    wanted = model(ids).logits.detach()
    values = {path: unpacked(host) for path, host, _ in named_adapters(model)}
    merge(model)
    for path, host, adapter in named_adapters(model):
        delta = adapter.delta().t() if kind == "gpt2" else adapter.delta()
        weight = host.get_parameter("weight")
        assert torch.equal(weight, (values[path].float() + delta).bfloat16())
        assert not is_packed(host) and not weight.requires_grad
    assert relative_error(model(ids).logits, wanted) < 0.02
    unmerge(model)
    after = dict(model.named_parameters())
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert torch.equal(model(ids).logits, wanted)


def test_the_adapter_is_a_plain_lora_of_the_values(tmp_path: Path) -> None:
    """PEFT on a base that holds what the packed weights stand for gives the same logits."""
    model = causal_model("llama", **SIZES).eval()
    base = copy.deepcopy(model)
    quantize(model, "nf4")
    attach(model, LoraConfig(r=4))
    randomized(model)
    for path, host, _ in named_adapters(model):
        base.get_submodule(path).weight.data = unpacked(host)
    save_adapter(model, tmp_path)
    ids = torch.arange(10).view(2, 5)
    with torch.no_grad():
        got, bare = model(ids).logits, base(ids).logits
        with disabled(model):
            torch.testing.assert_close(model(ids).logits, bare)
        wanted = PeftModel.from_pretrained(base, str(tmp_path))(ids).logits
    torch.testing.assert_close(got, wanted)
    assert not torch.allclose(got, bare)


def test_moving_a_model_leaves_packed_weights_alone() -> None:
    model = causal_model("llama", **SIZES)
    quantize(model, "nf4")
    before = model.get_parameter("model.layers.0.mlp.up_proj.weight_codes").clone()
    model.to(torch.float64).bfloat16()
    assert torch.equal(model.get_parameter("model.layers.0.mlp.up_proj.weight_codes"), before)
    assert model(torch.arange(5)[None]).logits.dtype == torch.bfloat16
