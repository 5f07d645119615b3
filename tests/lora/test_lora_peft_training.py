"""Ten AdamW steps beside PEFT, in float64: logits, every gradient, every A and B."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from causal_models import causal_model, relative_error, token_ids
from torch import nn

from dlora import load_adapter
from dlora.lora.attach import trainable_parameters

STEPS, TOLERANCE = 10, 1e-9
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "gpt2": ("gpt2", {}),
    "mistral": ("mistral", {}),
    "tied, embedding and head": ("tied", {"target_modules": ["v_proj", "embed_tokens", "lm_head"]}),
    "rslora and ranks": ("llama", {"use_rslora": True, "rank_pattern": {"down_proj": 3}}),
    "dora": ("llama", {"use_dora": True}),
    "dora, gpt2": ("gpt2", {"use_dora": True, "use_rslora": True}),
    "dora, embedding": ("llama", {"use_dora": True, "target_modules": ["v_proj", "embed_tokens"]}),
    "copies": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["norm", "lm_head"]}),
}
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


def names_in_peft(model: nn.Module) -> dict[str, str]:
    """Our name of each trainable parameter → PEFT's."""
    renamed = {}
    for name in trainable_parameters(model):
        path, _, factor = name.partition(".adapter.")
        if factor == "lora_magnitude_vector":
            renamed[name] = f"base_model.model.{path}.{factor}.default.weight"
        elif factor not in ("lora_A", "lora_B"):  # a trained copy
            renamed[name] = f"base_model.model.{path}.modules_to_save.default.{factor}"
        elif isinstance(model.get_submodule(path), nn.Embedding):
            renamed[name] = f"base_model.model.{path}.{factor.replace('_', '_embedding_')}.default"
        else:
            renamed[name] = f"base_model.model.{path}.{factor}.default.weight"
    return renamed


@pytest.mark.parametrize("case", CASES)
def test_training_equals_peft(case: str, tmp_path: Path) -> None:
    kind, settings = CASES[case]
    settings = {"target_modules": "all-linear", "r": 4, "lora_alpha": 8} | settings
    torch.manual_seed(5)
    config = peft.LoraConfig(task_type="CAUSAL_LM", **settings)
    theirs = peft.get_peft_model(causal_model(kind).double(), config).double().train()
    theirs.save_pretrained(tmp_path)
    ours = load_adapter(causal_model(kind).double(), tmp_path).double().train()

    names, reference = names_in_peft(ours), dict(theirs.named_parameters())
    trained = trainable_parameters(ours)
    assert {n for n, p in reference.items() if p.requires_grad} == set(names.values())
    start = {name: p.detach().clone() for name, p in trained.items()}
    options = {"lr": 1e-3, "weight_decay": 0.01, "fused": True}
    optimizers = [
        torch.optim.AdamW(trained.values(), **options),
        torch.optim.AdamW([reference[name] for name in names.values()], **options),
    ]
    for step in range(STEPS):
        ids = token_ids(rows=3, tokens=12, seed=step)
        outputs = [model(ids, labels=ids) for model in (ours, theirs)]
        assert relative_error(outputs[0].logits, outputs[1].logits) < TOLERANCE, step
        for output in outputs:
            output.loss.backward()
        for name, parameter in trained.items():
            gradient = reference[names[name]].grad
            assert relative_error(parameter.grad, gradient) < TOLERANCE, (step, name)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    for name, parameter in trained.items():
        assert relative_error(parameter, reference[names[name]]) < TOLERANCE, name
        assert not torch.equal(parameter, start[name]), name
