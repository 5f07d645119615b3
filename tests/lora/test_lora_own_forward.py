"""Layers with a forward of their own: adapted where it computes the same, beside PEFT's."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from causal_models import quiet_peft, randomize, randomize_trainable, relative_error, token_ids
from peft import LoraConfig as PeftConfig
from peft import get_peft_model
from refusals import refusal
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.models.idefics.modeling_idefics import IdeficsDecoupledLinear
from transformers.models.inkling.modeling_inkling import InklingNormedEmbedding
from transformers.models.llama4.modeling_llama4 import Llama4Router

from dlora import LoraConfig, attach, merge
from dlora.base.quantize import quantize
from dlora.lora.attach import trainable_parameters
from dlora.lora.layers import AdaptedEmbedding, AdaptedLinear, layer_kind
from dlora.lora.weight_reads import weight_reads, weights_asked_for

pytestmark = quiet_peft
_SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), None),
}
KINDS: dict[str, dict[str, Any]] = {
    "Falcon": {"attention_dropout": 0.0, "hidden_dropout": 0.0},
    "Gemma3Text": {"num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 40},
    "Jamba": {
        "num_key_value_heads": 2,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "num_experts": 2,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "intermediate_size": 40,
        "use_mamba_kernels": False,
    },
    "Bloom": {},
}


def causal(kind: str, dtype: torch.dtype = torch.float64) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**_SIZES, **KINDS[kind])
    model = AutoModelForCausalLM.from_config(
        config, dtype=dtype, attn_implementation="eager", experts_implementation="eager"
    )
    randomize(model)
    return model.eval()


@pytest.mark.parametrize(
    ("kind", "targets", "layers"),
    [
        ("Falcon", ["query_key_value", "dense_4h_to_h"], AdaptedLinear),
        ("Gemma3Text", ["embed_tokens"], AdaptedEmbedding),
    ],
)
def test_a_subclass_that_computes_the_same_is_adapted_as_peft_adapts_it(
    kind: str, targets: list[str], layers: type
) -> None:
    ours, theirs = causal(kind), causal(kind)
    attach(ours, LoraConfig(r=3, lora_alpha=5, target_modules=targets))
    peft = get_peft_model(
        theirs, PeftConfig(r=3, lora_alpha=5, target_modules=targets), autocast_adapter_dtype=False
    )
    assert all(isinstance(ours.get_submodule(p), layers) for p in ours.dlora.adapted)
    randomize_trainable(ours)
    pairs = [
        (ours.get_submodule(path).adapter, peft.base_model.model.get_submodule(path))
        for path in ours.dlora.adapted
    ]
    factors = []
    for adapter, other in pairs:
        where = "lora_embedding_{}" if layers is AdaptedEmbedding else "lora_{}"
        for factor in "AB":
            copy = getattr(other, where.format(factor))["default"]
            factors.append((adapter.get_parameter(f"lora_{factor}"), getattr(copy, "weight", copy)))
            factors[-1][1].data.copy_(factors[-1][0].data)
    outputs = [model(token_ids()).logits for model in (ours, peft)]
    assert relative_error(*outputs) < 1e-6  # its norms compute in float32
    for output in outputs:
        output.square().sum().backward()
    for own, other in factors:
        assert relative_error(own.grad, other.grad) < 1e-5
    merged = merge(ours)(token_ids()).logits
    assert relative_error(merged, outputs[0]) < 1e-6


class Clipped(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.clamp(-100, 100))


class Noisy(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(super().forward(x), 0.1, self.training)


class InFloat32(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x.float(), self.weight.float(), self.bias.float())


class Spelled(nn.Linear):
    def forward(self, rows: Tensor) -> Tensor:
        flat = torch.addmm(self.bias, rows.reshape(-1, rows.shape[-1]), self.weight.t())
        return flat.view(*rows.shape[:-1], -1)


OTHERS: dict[str, tuple[Callable[[], nn.Module], type | None]] = {
    "clipped": (lambda: Clipped(4, 3), None),
    "noisy": (lambda: Noisy(4, 3), None),
    "in float32": (lambda: InFloat32(4, 3), None),
    "another spelling": (lambda: Spelled(4, 3), AdaptedLinear),
    "no more outputs": (lambda: IdeficsDecoupledLinear(4, 3, 0), AdaptedLinear),
    "more outputs": (lambda: IdeficsDecoupledLinear(4, 3, 2), None),
    "normed embedding": (lambda: InklingNormedEmbedding(5, 4, 0, 1e-5), None),
    "router": (
        lambda: Llama4Router(
            transformers.Llama4TextConfig(hidden_size=4, num_local_experts=2, num_experts_per_tok=1)
        ),
        None,
    ),
}


@pytest.mark.parametrize("case", OTHERS)
def test_what_a_forward_computes_decides_and_no_name(case: str) -> None:
    make, kind = OTHERS[case]
    model = nn.ModuleDict({"layer": make(), "plain": nn.Linear(2, 2)})
    assert layer_kind(model["layer"]) is kind
    with torch.device("meta"):
        assert layer_kind(make()) is kind
    if kind is None:
        said = refusal(attach, model, LoraConfig(target_modules=["layer"]))
        assert "computes something else than the layer that it is derived from" in said
        attach(model, LoraConfig(r=1))
        assert "plain" in model.dlora.adapted and "layer" not in model.dlora.adapted


def test_a_falcon_is_packed_and_computes_with_what_it_unpacks() -> None:
    config = transformers.FalconConfig(**_SIZES | {"hidden_size": 64}, **KINDS["Falcon"])
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    done = quantize(model, "nf4")
    assert {path.rpartition(".")[2] for path in done.packed} == {
        "query_key_value",
        "dense",
        "dense_h_to_4h",
        "dense_4h_to_h",
    }
    attach(model, LoraConfig(r=2))
    randomize_trainable(model)
    expected = model(token_ids()).logits
    assert relative_error(merge(model)(token_ids()).logits, expected) < 1e-5


def test_a_weight_that_a_parent_reads_is_left_alone_and_said() -> None:
    """Jamba computes with `dt_proj.weight`; an adapter of PEFT's there has no effect."""
    model = causal("Jamba")
    with pytest.warns(UserWarning, match="past an adapter") as said:
        attach(model, LoraConfig(r=2))
    lines = [str(warning.message) for warning in said if "past an adapter" in str(warning.message)]
    assert lines == [
        "target_modules: all-linear leaves 1 linear layers alone (dt_proj): JambaMambaMixer reads "
        "their weight itself, past an adapter"
    ]
    adapted = {path.rpartition(".")[2] for path in model.dlora.adapted}
    assert "dt_proj" not in adapted and {"in_proj", "x_proj", "out_proj", "q_proj"} <= adapted
    randomize_trainable(model)
    model(token_ids()).logits.sum().backward()
    # Two experts, and each token goes to both.
    assert all(p.grad is not None for p in trainable_parameters(model).values())

    named = LoraConfig(target_modules=["dt_proj"])
    assert "dt_proj would have no effect: JambaMambaMixer reads the weight itself" in refusal(
        attach, causal("Jamba"), named
    )
    packed = quantize(causal("Jamba", torch.float32), "int8")
    assert not any(path.endswith("dt_proj") for path in packed.packed)
    assert "JambaMambaMixer reads its weight itself" in packed.left.values()


def mamba() -> Any:
    torch.manual_seed(0)
    config = transformers.MambaConfig(**_SIZES | {"hidden_size": 64}, state_size=4)
    return AutoModelForCausalLM.from_config(config)


def test_what_a_fused_kernel_would_take_is_left_alone_but_where_it_is_named() -> None:
    """A Mamba hands `x_proj.weight` to a kernel where there is one, and else calls the layer."""
    model = mamba()
    with pytest.warns(UserWarning, match="dt_proj.*MambaMixer reads their weight itself"):
        attach(model, LoraConfig(r=2))
    assert {path.rpartition(".")[2] for path in model.dlora.adapted} == {"in_proj"}

    packed = mamba()
    assert {path.rpartition(".")[2] for path in quantize(packed, "nf4").packed} == {"in_proj"}
    attach(packed, LoraConfig(r=2, target_modules=["x_proj", "in_proj"]))
    randomize_trainable(packed)
    packed.train()(token_ids()).logits.sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in trainable_parameters(packed).values())


class Readers(nn.Module):
    """Every way in which a parent may come by a weight."""

    def __init__(self, slow: bool = False) -> None:
        super().__init__()
        self.slow = slow
        for name in ("read", "aliased", "called", "cast", "in_a_branch", "handed_over"):
            self.add_module(name, nn.Linear(4, 4))
        self.many = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])

    def forward(self, x: Tensor) -> Tensor:
        layer = self.aliased
        x = (x @ self.read.weight.t()) @ layer.weight
        for one in self.many:
            x = x @ one.weight
        x = self.cast(self.called(x).to(self.cast.weight.dtype))
        fused = self.fused(x, self.handed_over.weight)
        x = self.handed_over(x) if fused is None else fused
        return x @ self.in_a_branch.weight if self.slow else self.in_a_branch(x)

    def fused(self, x: Tensor, weight: Tensor) -> Tensor | None:
        return None


@pytest.mark.parametrize("slow", [False, True])
def test_reads_are_found_however_they_are_spelled(slow: bool) -> None:
    found = {path for path, read in weight_reads(Readers(slow)).items() if read.bypasses}
    always = {"read", "aliased", "many.0", "many.1", "handed_over"}
    # The branch that a setting rules out counts for nothing, like Bloom's slow one.
    assert found == always | ({"in_a_branch"} if slow else set())
    assert not weight_reads(causal("Bloom"))


class Block(nn.Module):
    """A linear layer, a router of another kind, and a classifier whose weight is cast and read."""

    def __init__(self) -> None:
        super().__init__()
        self.proj, self.classifier = nn.Linear(8, 8), nn.Linear(8, 4, bias=False)
        sizes = {"hidden_size": 8, "num_local_experts": 4, "num_experts_per_tok": 1}
        self.router = Llama4Router(transformers.Llama4TextConfig(**sizes))

    def forward(self, x: Tensor) -> Tensor:
        routed, _ = self.router(self.proj(x))
        return routed + nn.functional.linear(x, self.classifier.weight.type(torch.float32))


class Scaling(nn.Module):
    """Scales the weights of its blocks in place, as RWKV does."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, x: Tensor) -> Tensor:
        for number, block in enumerate(self.blocks):
            block.proj.weight.div_(2**number)
        return self.blocks[1](self.blocks[0].proj(x))


def test_a_router_and_a_weight_that_is_cast_are_left_alone_and_said() -> None:
    """Llama 4's router returns two tensors, with which PEFT's adapter fails; LongCat casts."""
    theirs = get_peft_model(Block(), PeftConfig(target_modules=["router"]))
    with pytest.raises((TypeError, AttributeError)):
        theirs(torch.randn(3, 8))
    model = Block()
    with pytest.warns(UserWarning, match="all-linear leaves") as said:
        attach(model, LoraConfig(r=2))
    assert model.dlora.adapted == ["proj"]
    lines = [str(warning.message) for warning in said]
    assert any("(router): Llama4Router computes something else" in line for line in lines)
    assert any("(classifier): Block reads their weight" in line for line in lines)


def test_a_weight_that_is_scaled_in_a_counted_loop_is_no_read_but_asked_for() -> None:
    model = Scaling()
    assert {p for p in weight_reads(model) if p.endswith("proj")} == set()
    assert weights_asked_for(model) == {f"blocks.{i}.proj": "Scaling" for i in (0, 1)}
