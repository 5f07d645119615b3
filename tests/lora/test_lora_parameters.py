"""`target_parameters`: stacked weights of experts beside PEFT's, and what can be said of them."""

from typing import Any

import pytest
import torch
import transformers
from causal_models import (
    quiet_peft,
    randomize,
    randomize_trainable,
    relative_error,
    token_ids,
)
from peft import LoraConfig as PeftConfig
from peft import PeftModel, get_peft_model
from refusals import refusal
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, PreTrainedModel

from dlora import LoraConfig, attach, disabled, load_adapter, merge, save_adapter, unmerge
from dlora.lora.attach import trainable_parameters
from dlora.lora.low_rank_weight import LowRankWeight

pytestmark = quiet_peft
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
_SIZES = {
    "vocab_size": 97,
    "hidden_size": 24,
    "intermediate_size": 20,
    "moe_intermediate_size": 20,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts_per_tok": 2,
    **dict.fromkeys(("num_experts", "num_local_experts"), 4),
    **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), None),
}


def mixture(kind: str, experts: str = "eager", dtype: torch.dtype = torch.float64) -> Any:
    config = getattr(transformers, f"{kind}Config")(**_SIZES)
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(
        config, dtype=dtype, experts_implementation=experts
    )
    randomize(model)
    return model


def name_in_peft(name: str) -> str:
    """PEFT wraps the module of the experts for one parameter after the other."""
    name = name.replace(".experts.adapter.gate_up_proj.", ".experts.base_layer.")
    name = name.replace(".experts.adapter.down_proj.", ".experts.").replace(".adapter.", ".")
    return f"base_model.model.{name}.default.weight"


# A router whose choice is a constant apart, each way in which transformers multiplies by experts.
@pytest.mark.parametrize(
    ("kind", "experts", "dtype"),
    [
        ("Qwen3Moe", "eager", torch.float64),
        ("Qwen3Moe", "batched_mm", torch.float64),
        ("Qwen3Moe", "grouped_mm", torch.float32),
        ("GptOss", "eager", torch.float64),
        ("GptOss", "grouped_mm", torch.float32),
    ],
)
def test_logits_gradients_and_merged_weights_are_peft_s(
    kind: str, experts: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    tolerance = 1e-9 if dtype == torch.float64 else 1e-5
    ours, theirs = mixture(kind, experts, dtype), mixture(kind, experts, dtype)
    settings: dict[str, Any] = {
        "r": 3,
        "lora_alpha": 5,
        "target_modules": ["q_proj"],
        "target_parameters": EXPERTS,
        "rank_pattern": {"down_proj": 2},
        "use_rslora": True,
    }
    attach(ours, LoraConfig(**settings))
    peft = get_peft_model(theirs, PeftConfig(**settings), autocast_adapter_dtype=False)
    trained, reference = trainable_parameters(ours), dict(peft.named_parameters())
    names = {name: name_in_peft(name) for name in trained}
    assert set(names.values()) == {n for n, p in reference.items() if p.requires_grad}
    assert trained.keys() < dict(ours.named_parameters()).keys()
    randomize_trainable(ours)
    with torch.no_grad():
        for name, parameter in trained.items():
            reference[names[name]].copy_(parameter)
    formed = []
    whole = LowRankWeight.__dict__["whole"].func
    monkeypatch.setattr(
        LowRankWeight, "whole", property(lambda self: formed.append(1) or whole(self))
    )
    outputs = [model(token_ids()).logits for model in (ours, peft)]
    assert not formed  # neither ΔW nor W0 + ΔW
    assert relative_error(*outputs) < tolerance
    for output in outputs:
        output.square().sum().backward()
    for name, parameter in trained.items():
        assert relative_error(parameter.grad, reference[names[name]].grad) < tolerance, name

    before = {name: p.clone() for name, p in ours.named_parameters()}
    merge(ours)
    merged = peft.merge_and_unload()
    for name in (f"model.layers.0.mlp.{e}" for e in EXPERTS):
        assert not torch.equal(ours.get_parameter(name), before[name])
        assert relative_error(ours.get_parameter(name), merged.get_parameter(name)) < tolerance
    assert relative_error(ours(token_ids()).logits, outputs[0]) < tolerance
    unmerge(ours)
    assert all(torch.equal(p, before[name]) for name, p in ours.named_parameters())


def test_a_grouped_product_sums_gradients_of_the_factors_in_float32() -> None:
    """Against float64 of the rounded numbers; rounded to bfloat16 they would be 2e-3 off."""
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    x, weight = drawn(40, 16).bfloat16(), drawn(3, 16, 24).bfloat16()
    left, right = drawn(3, 16, 3).requires_grad_(), drawn(3, 3, 24).requires_grad_()
    ends = torch.tensor([7, 25, 40], dtype=torch.int32)
    dy = drawn(40, 24).bfloat16()
    y = F.grouped_mm(x, LowRankWeight(weight, left, right, 2.0), offs=ends)  # type: ignore[arg-type]
    y.backward(dy)
    parts = [range(7), range(7, 25), range(25, 40)]
    for expert, rows in enumerate(parts):
        some, slopes = x[rows.start : rows.stop].double(), dy[rows.start : rows.stop].double() * 2
        inner = (some @ left[expert].detach().bfloat16().double()).bfloat16().double()
        dinner = (slopes @ right[expert].detach().bfloat16().double().t()).bfloat16().double()
        assert relative_error(right.grad[expert], inner.t() @ slopes) < 1e-5  # type: ignore[index]
        assert relative_error(left.grad[expert], some.t() @ dinner) < 1e-5  # type: ignore[index]


@pytest.mark.parametrize("kind", ["Qwen3Moe", "Mixtral"])
def test_files_go_to_peft_and_come_back(kind: str, tmp_path: Any) -> None:
    ours = mixture(kind)
    parameters = [*EXPERTS, "gate.weight"]
    config = LoraConfig(r=3, target_modules=["q_proj"], target_parameters=parameters)
    attach(ours, config)
    randomize_trainable(ours)
    with torch.no_grad():  # files are float32
        for parameter in trainable_parameters(ours).values():
            parameter.copy_(parameter.float())
        expected = ours(token_ids()).logits
        with disabled(ours):
            assert relative_error(ours(token_ids()).logits, expected) > 1e-2
        save_adapter(ours, tmp_path / "ours")
        there = PeftModel.from_pretrained(
            mixture(kind), tmp_path / "ours", autocast_adapter_dtype=False
        )
        assert relative_error(there(token_ids()).logits, expected) < 1e-6
        there.save_pretrained(tmp_path / "theirs")
        back = load_adapter(mixture(kind), tmp_path / "theirs")
        assert relative_error(back(token_ids()).logits, expected) < 1e-6


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(3, 4, 6))
        self.scale = nn.Parameter(torch.ones(6))
        self.inner = nn.Linear(6, 6)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stack = Stack()


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no such parameter": (
        {"target_parameters": ["stack.tabel"]},
        "target_parameters: 'stack.tabel' matches no parameter; did you mean table?",
    ),
    "a module": (
        {"target_parameters": ["stack.inner"]},
        "stack.inner is a module; name it in target_modules (or inner.weight here)",
    ),
    "a vector": ({"target_parameters": ["scale"]}, "stack.scale has 1 dim(s)"),
    "adapted already": ({"target_parameters": ["inner.weight"]}, "adapts stack.inner already"),
    "dropout": (
        {"target_parameters": ["table"], "lora_dropout": 0.1},
        "lora_dropout: 0.1 cannot act on target_parameters",
    ),
    "dora": ({"target_parameters": ["table"], "use_dora": True}, "need a plain LoRA, not dora"),
    "pissa": (
        {"target_parameters": ["table"], "init_lora_weights": "pissa"},
        "pissa is no start for them",
    ),
    "as a module": (
        {"target_modules": ["table"]},
        "stack.table is the stacked weights of experts, a parameter, not a module; use "
        "target_parameters: [stack.table]",
    ),
    "its module": (
        {"target_modules": ["stack"]},
        "stack is a Stack, which cannot carry an adapter (its weights are stacks of matrices: use "
        "target_parameters: [stack.table])",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_name_that_cannot_be_meant_is_answered_with_what_can(case: str) -> None:
    settings, message = REFUSED[case]
    assert message in refusal(lambda: attach(Net(), LoraConfig(**settings)))


def test_a_part_of_fused_experts_is_answered_with_the_stack() -> None:
    said = refusal(lambda: attach(mixture("Qwen3Moe"), LoraConfig(target_modules=["gate_proj"])))
    assert "gate_proj is a part of model.layers.0.mlp.experts.gate_up_proj" in said
    assert said.endswith("use target_parameters: [experts.gate_up_proj]")


def test_all_linear_says_what_it_leaves_of_the_experts() -> None:
    model = mixture("Qwen3Moe")
    left = sum(p.numel() for n, p in model.named_parameters() if n.endswith("_proj"))
    total = sum(p.numel() for p in model.parameters())
    with pytest.warns(UserWarning, match="stacked weights of experts") as said:
        attach(model, LoraConfig(r=2))
    [line] = [str(warning.message) for warning in said if "stacked" in str(warning.message)]
    assert f"{left:,} of {total:,} parameters" in line
    assert "target_parameters: [experts.gate_up_proj, experts.down_proj] adapts them" in line


def test_an_expert_without_tokens_has_a_gradient_of_zero() -> None:
    model = mixture("Qwen3Moe")
    attach(model, LoraConfig(r=2, target_modules=[], target_parameters=EXPERTS))
    randomize_trainable(model)
    model(token_ids(1, 1)).logits.sum().backward()  # one token, so two experts of four
    A = model.model.layers[0].mlp.experts.adapter.down_proj.lora_A
    assert sorted(map(bool, A.grad.view(4, -1).any(1))) == [False, False, True, True]
