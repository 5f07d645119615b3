"""Layers that share their weights by more than one tie (Zamba) are merged one by one."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from exported import attach_random
from models.architectures import Architecture
from tiny import tokenizer

from dlora import LoraConfig, save_adapter
from dlora.export.command import main


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_ties_that_untying_one_weight_unties_get_tensors_of_their_own(tmp_path: Path) -> None:
    """Its embedding and head are tied too, and `tie_word_embeddings: false` unties all."""
    zamba = Architecture("zamba", "", "AutoModelForCausalLM")
    base = tmp_path / "base"
    model: Any = zamba._made(transformers.CONFIG_MAPPING["zamba"])
    assert "lm_head.weight" in model.all_tied_weights_keys
    model.save_pretrained(base)
    tokenizer().save_pretrained(base)
    attach_random(model, LoraConfig(r=2, target_modules=["q_proj", "up_proj"]))
    save_adapter(model, tmp_path / "adapter")
    words = ["--adapter", str(tmp_path / "adapter"), "--base", str(base), "--merge"]
    main([*words, "--to", str(tmp_path / "merged")])
    ids = torch.arange(60, 84)[None]
    merged = zamba.read(tmp_path / "merged")
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, model(ids).logits, atol=1e-4, rtol=1e-4)
