"""Adapters of the text part of a composite model, for the class that vLLM loads."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from causal_models import quiet_peft, randomize, randomize_trainable, relative_error
from refusals import refusal
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from dlora import LoraConfig, attach, load_adapter, save_adapter
from dlora.export.command import main

pytestmark = quiet_peft
SETTINGS: dict[str, Any] = {
    "r": 3,
    "lora_alpha": 5,
    "target_modules": ["q_proj", "up_proj"],
    "rank_pattern": {r"layers\.0\.mlp\.up_proj": 2},
    "alpha_pattern": {"q_proj": 7},
    "modules_to_save": ["lm_head"],
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny Qwen3.5, saved as the composite model that it is."""
    text = {
        "vocab_size": 97,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "linear_num_value_heads": 2,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "layer_types": ["linear_attention", "full_attention"],
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e4,
            "mrope_section": [1, 1, 2],
            "partial_rotary_factor": 1.0,
        },
    }
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "num_heads": 2,
        "intermediate_size": 16,
        "out_hidden_size": 16,
        "patch_size": 4,
    }
    config = transformers.Qwen3_5Config(text_config=text, vision_config=vision)
    model = transformers.Qwen3_5ForConditionalGeneration(config)
    randomize(model)
    directory = str(tmp_path_factory.mktemp("composite"))
    model.save_pretrained(directory)
    return directory


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model.eval()(input_ids=torch.arange(12).view(2, 6)).logits


def adapted(base: str, directory: Path) -> Any:
    """The text class with an adapter, which is saved."""
    model = attach(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**SETTINGS))
    randomize_trainable(model)
    save_adapter(model, directory)
    return model


def test_it_is_written_for_the_class_that_was_asked_for(
    base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ours = adapted(base, tmp_path / "adapter")
    words = ["--adapter", str(tmp_path / "adapter"), "--to"]
    assert main([*words, str(tmp_path / "part")]) == 0
    said = capsys.readouterr().out
    assert "for Qwen3_5ForConditionalGeneration, which vLLM loads, export it with --layout" in said
    assert main([*words, str(tmp_path / "whole"), "--layout", "checkpoint"]) == 0
    assert "--layout" not in capsys.readouterr().out
    for name, auto in (("part", AutoModelForCausalLM), ("whole", AutoModelForImageTextToText)):
        theirs = peft.PeftModel.from_pretrained(auto.from_pretrained(base), tmp_path / name)
        assert relative_error(logits(theirs), logits(ours)) < 1e-5, name
    found = peft.AutoPeftModel.from_pretrained(str(tmp_path / "whole"))
    assert type(found.get_base_model()).__name__ == "Qwen3_5ForConditionalGeneration"
    assert relative_error(logits(found), logits(ours)) < 1e-5
    # Both are read again into the class that dlora trains.
    for name in ("part", "whole"):
        again = load_adapter(AutoModelForCausalLM.from_pretrained(base), tmp_path / name)
        assert relative_error(logits(again), logits(ours)) < 1e-5, name


def test_the_names_are_those_of_the_files(base: str, tmp_path: Path) -> None:
    """vLLM maps the names of an adapter by the rules that it has for the files' keys."""
    from safetensors.torch import load_file

    adapted(base, tmp_path / "adapter")
    words = ["--adapter", str(tmp_path / "adapter"), "--to", str(tmp_path / "whole")]
    assert main([*words, "--layout", "checkpoint"]) == 0
    stored = set(load_file(f"{base}/model.safetensors"))
    for key in load_file(tmp_path / "whole/adapter_model.safetensors"):
        path = key.removeprefix("base_model.model.").partition(".lora_")[0]
        assert path in stored or f"{path}.weight" in stored, key
    settings = json.loads((tmp_path / "whole/adapter_config.json").read_text())
    assert all(f"{target}.weight" in stored for target in settings["target_modules"])


@pytest.mark.parametrize("other", [["--merge"], ["--format", "adalora"]], ids=" ".join)
def test_a_layout_that_cannot_act_is_refused(other: list[str]) -> None:
    said = refusal(main, ["--adapter", "a", "--to", "b", "--layout", "checkpoint", *other])
    assert said.startswith("--layout cannot act with --merge")
