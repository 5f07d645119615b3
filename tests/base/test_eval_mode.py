"""In training only adapters are in training mode: W0 draws nothing at random."""

import warnings
from typing import Any

import pytest
import torch
import transformers
from causal_models import causal_model, randomize, randomize_trainable, token_ids
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from dlora import LoraConfig, attach, shard
from dlora.base.eval_mode import keep_in_eval, random_settings
from dlora.lora.variants import LoraAdapter

DROPS = {"resid_pdrop": 0.3, "embd_pdrop": 0.3, "attn_pdrop": 0.3}
SMALL = {"vocab_size": 97, "num_hidden_layers": 3, "num_attention_heads": 4}
BASES: dict[str, Any] = {
    "GPT-2": lambda: causal_model("gpt2", **DROPS),
    "attention alone": lambda: causal_model("llama", attention_dropout=0.5),
    "a router's noise": lambda: causal_model("mixtral", router_jitter_noise=0.5),
    "layers are skipped": lambda: transformers.OPTForCausalLM(
        transformers.OPTConfig(
            **SMALL, hidden_size=24, word_embed_proj_dim=24, ffn_dim=32, layerdrop=0.5
        )
    ),
    "a router that draws": lambda: transformers.PhimoeForCausalLM(
        transformers.PhimoeConfig(
            **SMALL,
            hidden_size=24,
            intermediate_size=32,
            num_key_value_heads=2,
            num_local_experts=4,
        )
    ),
}


def adapted(name: str) -> Any:
    model = BASES[name]()
    randomize(model)
    torch.manual_seed(0)
    attach(model, LoraConfig(r=2, target_modules="all-linear"))
    randomize_trainable(model)
    return model


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("name", BASES)
def test_a_pass_in_training_is_one_in_evaluation(name: str, recomputed: bool) -> None:
    """With recomputation, backward sees what forward saw: the gradients are the same as well."""
    reference, model = adapted(name).eval(), adapted(name)
    if recomputed:
        model.activation_checkpointing_enable({"use_reentrant": False})
    keep_in_eval(model)
    losses = []
    for each in (reference, model.eval().train()):
        ids = token_ids()
        losses.append(each(ids, labels=ids, use_cache=False).loss)
        losses[-1].backward()
    torch.testing.assert_close(losses[1], losses[0])
    for wanted, got in zip(reference.parameters(), model.parameters(), strict=True):
        if wanted.requires_grad:
            torch.testing.assert_close(got.grad, wanted.grad)


def test_adapters_and_what_recomputes_are_in_training_mode() -> None:
    model = adapted("GPT-2")
    model.activation_checkpointing_enable({"use_reentrant": False})
    keep_in_eval(model)
    model.train()
    kinds = (LoraAdapter, GradientCheckpointingLayer)
    for module in model.modules():
        assert module.training == (module is model or isinstance(module, kinds))
    calls: list[int] = []
    layer = model.transformer.h[0].mlp
    layer.register_forward_pre_hook(lambda *_: calls.append(1))
    model(token_ids()).logits.sum().backward()
    assert len(calls) == 2  # forward, and again in backward
    model.eval()
    assert not any(module.training for module in model.modules())


def test_weights_are_not_rescaled() -> None:
    """An RWKV would divide some of W0 by 2 in eval mode, and multiply it again in training mode."""
    model = transformers.RwkvForCausalLM(
        transformers.RwkvConfig(
            vocab_size=97, hidden_size=24, num_hidden_layers=3, context_length=32, rescale_every=2
        )
    )
    randomize(model)
    attach(model, LoraConfig(r=2, target_modules=["key"]))
    keep_in_eval(model)
    model.train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model(token_ids(), use_cache=False).logits.sum().backward()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name


def test_a_long_sequence_has_a_gradient() -> None:
    """An xLSTM would compute what is longer than a chunk without one in eval mode."""
    model = transformers.xLSTMForCausalLM(
        transformers.xLSTMConfig(
            vocab_size=97, hidden_size=32, num_heads=2, num_blocks=2, max_inference_chunksize=8
        )
    )
    randomize(model)
    attach(model, LoraConfig(r=2, target_modules=["q"]))
    keep_in_eval(model)
    model.train()
    assert model.backbone.training
    assert model.backbone(token_ids(2, 16), use_cache=False)[0].requires_grad


def test_settings_that_draw_are_named() -> None:
    named = random_settings(BASES["GPT-2"]())
    assert sorted(named) == ["attn_pdrop 0.3", "embd_pdrop 0.3", "resid_pdrop 0.3"]
    assert random_settings(causal_model("llama")) == []
    assert random_settings(BASES["a router's noise"]()) == ["router_jitter_noise 0.5"]
    nested = transformers.DbrxConfig(attn_config={"attn_pdrop": 0.2}, resid_pdrop=0.1)
    with torch.device("meta"):
        model = nn.Module()
    model.config = nested  # type: ignore[assignment]
    assert random_settings(model) == ["resid_pdrop 0.1", "attn_config.attn_pdrop 0.2"]
    assert random_settings(nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.2))) == ["Dropout 0.2"]


def test_a_loop_of_ones_own_is_warned_once() -> None:
    with pytest.warns(UserWarning, match=r"shard: in training mode the base draws at random \(.*"):
        shard(adapted("GPT-2"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        shard(causal_model("llama"))
