"""Rotary scalings that depend on a sequence's length: that of each row alone, not of the batch."""

import copy
from typing import Any

import pytest
import torch
import transformers
from causal_models import VOCABULARY, randomize, randomize_trainable, relative_error
from refusals import refusal
from torch import Tensor, nn
from torch.nn import functional as F

from dlora import LoraConfig, attach
from dlora.base.eval_mode import keep_in_eval
from dlora.lora.attach import trainable_parameters
from dlora.objectives import chunked_loss
from dlora.objectives.own_length import check_scalings, forget_lengths

ORIGINAL, LENGTHS = 16, [30, 7, 16, 22, 17, 5]
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": ORIGINAL,
    "short_factor": [1.0] * 4,
    "long_factor": [3.0, 4.0, 5.0, 6.0],
}
LAYER_TYPES = {"sliding_attention": {"rope_type": "default", "rope_theta": 10000.0}}
GEMMA = {"head_dim": 8, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = {"num_local_experts": 3, "num_experts_per_tok": 2}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "Phi-3": ("Phi3", {"rope_parameters": LONG, "original_max_position_embeddings": ORIGINAL}),
    "a scale of its own": (
        "Phimoe",
        EXPERTS | {"rope_parameters": LONG | {"short_mscale": 1.1, "long_mscale": 1.3}},
    ),
    "partial": (
        "Phi3",
        {
            "rope_parameters": LONG
            | {"partial_rotary_factor": 0.5, "short_factor": [1.0] * 2, "long_factor": [3.0, 5.0]},
            "original_max_position_embeddings": ORIGINAL,
        },
    ),
    "longrope of Llama": ("Llama", {"rope_parameters": LONG}),
    "dynamic": ("Llama", {"rope_parameters": DYNAMIC, "max_position_embeddings": ORIGINAL}),
    "dynamic in blocks of one kind": (
        "Gemma3Text",
        GEMMA
        | {"rope_parameters": LAYER_TYPES | {"full_attention": DYNAMIC}}
        | {"max_position_embeddings": ORIGINAL},
    ),
    "longrope in blocks of one kind": (
        "Gemma3Text",
        GEMMA | {"rope_parameters": LAYER_TYPES | {"full_attention": LONG}},
    ),
}


def model_of(kind: str) -> Any:
    family, settings = KINDS[kind]
    config = getattr(transformers, f"{family}Config")(**SIZES | copy.deepcopy(settings))
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    randomize(model)
    attach(model, LoraConfig(r=2, target_modules=["o_proj"]))
    randomize_trainable(model)
    return model.eval()


def rows(order: list[int]) -> tuple[Tensor, Tensor, list[int]]:
    """Ids and targets of some of the sequences, padded to a multiple of 8, and their lengths."""
    lengths = [LENGTHS[index] for index in order]
    padded = -(-max(lengths) // 8) * 8
    ids, targets = torch.zeros(len(order), padded).long(), torch.full((len(order), padded), -100)
    for row, (index, n) in enumerate(zip(order, lengths, strict=True)):
        drawn = torch.Generator().manual_seed(index)
        ids[row, :n] = torch.randint(1, VOCABULARY, (n,), generator=drawn)
        targets[row, : n - 1] = ids[row, 1:n]
    return ids, targets, lengths


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in trainable_parameters(model).items() if p.grad is not None}


def alone(kind: str) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of all sequences, each in a model of transformers that saw no other."""
    losses, summed = 0.0, {}
    for index, n in enumerate(LENGTHS):
        model, (ids, targets, _) = model_of(kind), rows([index])
        logits = model(ids[:, :n]).logits
        loss = F.cross_entropy(logits[0, :-1], targets[0, : n - 1], reduction="sum")
        loss.backward()
        losses += float(loss.detach())
        for name, gradient in gradients(model).items():
            summed[name] = summed.get(name, 0) + gradient
    return losses, summed


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_row_has_the_positions_that_it_has_alone(kind: str, recomputed: bool) -> None:
    """Whatever came before it, and whatever is in its batch."""
    wanted, reference = alone(kind)
    order = list(range(len(LENGTHS)))
    for size in (1, 2, 6):
        model = model_of(kind)
        if recomputed:
            model.activation_checkpointing_enable({"use_reentrant": False})
        keep_in_eval(model)
        chunked_loss.install(model)
        model.train()
        loss = 0.0
        for start in range(0, len(order), size):
            ids, targets, lengths = rows(order[start : start + size])
            part = model(input_ids=ids, targets=targets, lengths=lengths)
            part.backward()
            loss += float(part.detach())
        assert loss == pytest.approx(wanted, rel=1e-6)
        for name, gradient in gradients(model).items():
            assert relative_error(gradient, reference[name]) < 1e-5, name


@pytest.mark.parametrize("kind", ["dynamic", "dynamic in blocks of one kind", "Phi-3"])
def test_a_plain_call_after_a_long_batch_is_that_of_a_fresh_model(kind: str) -> None:
    model, (ids, targets, lengths) = model_of(kind), rows([0, 3])
    chunked_loss.install(model)
    model(input_ids=ids, targets=targets, lengths=lengths)
    forget_lengths(model)
    short = rows([2])[0][:, :ORIGINAL]
    torch.testing.assert_close(model(short).logits, model_of(kind)(short).logits)


def test_lengths_have_to_be_given() -> None:
    model, (ids, targets, _) = model_of("dynamic"), rows([0])
    chunked_loss.install(model)
    assert "so it needs lengths=" in refusal(model, input_ids=ids, targets=targets)


class OwnRotary(nn.Module):
    """As in code that comes with a base: nothing shows that it looks at the longest row."""

    def forward(self, x: Tensor, position_ids: Tensor) -> Tensor:
        return x * position_ids.max()


def test_a_scaling_in_code_of_its_own_is_refused() -> None:
    model = model_of("Phi-3")
    check_scalings(model)
    model.model.rotary_emb = OwnRotary()
    said = refusal(check_scalings, model)
    assert said.startswith("model.path: Phi3ForCausalLM scales rotary positions by the longest")
    model.config.rope_parameters = {"rope_type": "yarn", "rope_theta": 10000.0}
    check_scalings(model)
