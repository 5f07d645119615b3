"""What a full fine-tune changed comes back as an adapter, as PEFT and transformers compute it."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from exported import Case, loaded, logits, made_by_peft
from safetensors.torch import load_file
from torch import nn

from dlora import load_adapter
from dlora.library.extract import main

CASES = [
    Case("llama", ["q_proj", "down_proj"]),
    Case("gpt2", ["c_attn"]),
    Case("llama", ["v_proj", "embed_tokens", "lm_head"]),
]


def extracted(base: Path, tuned: Path, to: Path, *words: str) -> Path:
    assert main(["--base", str(base), "--tuned", str(tuned), "--to", str(to), *words]) == 0
    return to


def by_peft(base: Path, adapter: Path) -> Any:
    return peft.PeftModel.from_pretrained(loaded(base), adapter).eval()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_merged_lora_comes_back_with_its_rank(case, bases, tmp_path) -> None:
    base = bases(case.base)
    origin = by_peft(base, made_by_peft(base, case, tmp_path / "origin"))
    deltas = {
        name.removeprefix("base_model.model."): module.get_delta_weight("default").detach()
        for name, module in origin.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }
    wanted = logits(origin)
    origin.merge_and_unload().save_pretrained(tmp_path / "tuned")
    to = extracted(base, tmp_path / "tuned", tmp_path / "adapter", "--energy", "0.999999")
    found = by_peft(base, to)
    layers = json.loads((to / "extraction.json").read_text())["layers"]
    assert layers.keys() == deltas.keys()
    for path, delta in deltas.items():
        layer = found.base_model.model.get_submodule(path)
        got = layer.get_delta_weight("default")
        assert (got - delta).norm() <= 1e-5 * delta.norm(), path
        assert layer.r["default"] == layers[path]["rank"] == (3 if "q_proj" in path else 4)
    torch.testing.assert_close(logits(found), wanted, rtol=1e-4, atol=1e-4)
    ours = load_adapter(loaded(base), to).eval()
    torch.testing.assert_close(logits(ours), wanted, rtol=1e-4, atol=1e-4)
