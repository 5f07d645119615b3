"""Ten AdamW steps beside PEFT, in float64: logits, every gradient, every A and B."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from beside_peft import check_steps
from causal_models import causal_model, quiet_peft, token_ids
from torch import Tensor, nn

from dlora import load_adapter

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
pytestmark = quiet_peft


@pytest.mark.parametrize("case", CASES)
def test_training_equals_peft(case: str, tmp_path: Path) -> None:
    kind, settings = CASES[case]
    settings = {"target_modules": "all-linear", "r": 4, "lora_alpha": 8} | settings
    torch.manual_seed(5)
    config = peft.LoraConfig(task_type="CAUSAL_LM", **settings)
    theirs = peft.get_peft_model(causal_model(kind).double(), config).double().train()
    theirs.save_pretrained(tmp_path)
    ours = load_adapter(causal_model(kind).double(), tmp_path).double().train()

    def run(model: nn.Module, step: int) -> tuple[Tensor, Tensor]:
        ids = token_ids(rows=3, tokens=12, seed=step)
        output = model(ids, labels=ids)
        return output.logits, output.loss

    check_steps(ours, theirs, 10, run, lr=1e-3)
