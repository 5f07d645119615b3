"""dlora's and PEFT's adapters in one model: refused in a line, whichever comes first."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftMixedModel, PromptTuningConfig, get_peft_model, inject_adapter_in_model
from tiny import whole
from torch import nn

from dlora import LoraConfig, UsageError, attach

CONFIG = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
THEIRS = PeftLoraConfig(r=4, target_modules=["q_proj", "v_proj"])
WAYS: dict[str, Callable[[Any], Any]] = {
    "get_peft_model": lambda model: get_peft_model(model, THEIRS),
    "inject_adapter_in_model": lambda model: inject_adapter_in_model(THEIRS, model),
    "add_adapter": lambda model: model.add_adapter(THEIRS),
    "PeftMixedModel": lambda model: PeftMixedModel(model, THEIRS),
}


@pytest.mark.parametrize("way", WAYS)
def test_peft_on_an_adapted_model_is_refused(saved_models: Any, way: str) -> None:
    """Before anything is changed."""
    model = attach(whole(saved_models("llama")), CONFIG)
    before = [(name, type(module)) for name, module in model.named_modules()]
    said = "this model has dlora adapters, which PEFT would wrap"
    if way == "add_adapter":  # a method of the model's own, which names dlora's
        said = r"add_adapter: dlora\.attach\(model, config, name\) adds adapters"
    with pytest.raises(UsageError, match=said):
        WAYS[way](model)
    assert [(name, type(module)) for name, module in model.named_modules()] == before
    assert not hasattr(model, "peft_config")


def test_a_plain_module_is_refused_to_peft_too() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    attach(model, LoraConfig(r=2))
    with pytest.raises(UsageError, match="get_peft_model: this model has dlora adapters"):
        get_peft_model(model, PeftLoraConfig(r=2, target_modules=["0"]))


@pytest.mark.parametrize("way", WAYS)
def test_a_model_with_adapters_of_peft_is_refused(saved_models: Any, way: str) -> None:
    theirs = WAYS[way](whole(saved_models("llama"))) or whole(saved_models("llama"))
    if way == "add_adapter":
        theirs.add_adapter(THEIRS)
    before = {name: p.requires_grad for name, p in theirs.named_parameters()}
    for config in (CONFIG, THEIRS):
        with pytest.raises(UsageError, match="^attach: .* of PEFT's, whose adapters would no long"):
            attach(theirs, config)
    assert {name: p.requires_grad for name, p in theirs.named_parameters()} == before


def test_prompts_of_peft_are_refused(saved_models: Any) -> None:
    settings = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(UsageError, match="^attach: the model is a PeftModelForCausalLM of PEFT's"):
        attach(get_peft_model(whole(saved_models("llama")), settings), CONFIG)


def test_a_base_that_peft_has_left_is_taken(saved_models: Any) -> None:
    model = get_peft_model(whole(saved_models("llama")), THEIRS).unload()
    attach(model, CONFIG)
    ids = torch.arange(12)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    assert model.model.layers[0].self_attn.q_proj.adapter.lora_B.grad is not None
