"""Every tensor of a model is taken once: low-rank, whole or by name."""

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from tiny import MODELS
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    GptOssConfig,
    MambaConfig,
    T5Config,
    T5ForConditionalGeneration,
)

from dlora import load_adapter
from dlora.library.extract import main
from dlora.library.units import Kind, units_of

MORE = {
    "mamba": lambda: MambaConfig(hidden_size=16, num_hidden_layers=1, vocab_size=32),
    "gpt_oss": lambda: GptOssConfig(
        hidden_size=16,
        num_hidden_layers=1,
        vocab_size=32,
        num_attention_heads=2,
        head_dim=8,
        intermediate_size=16,
        num_local_experts=4,
    ),
}
NAMES = ["llama", "gpt2", "mixtral", "tied", *MORE]


@pytest.mark.parametrize("name", NAMES)
def test_no_tensor_is_dropped_or_taken_twice(name: str) -> None:
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config((MODELS | MORE)[name]())
    shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    units = units_of(model, shapes)
    assert Counter(name for unit in units for name in unit.names) == Counter(shapes.keys())
    assert all(bool(unit.why) == (unit.kind is Kind.NAMED) for unit in units)


def test_experts_with_biases_are_stacks_whose_biases_are_named() -> None:
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(MORE["gpt_oss"]())
    shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    found = {unit.path: unit for unit in units_of(model, shapes)}
    experts = "model.layers.0.mlp.experts"
    assert found[f"{experts}.down_proj"].kind is Kind.STACK
    assert "stacks of matrices" in found[f"{experts}.down_proj_bias"].why


def test_an_encoder_and_a_decoder(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    config = T5Config(**sizes, vocab_size=40, decoder_start_token_id=0, pad_token_id=0)
    model = T5ForConditionalGeneration(config).eval()
    base, tuned = tmp_path / "base", tmp_path / "tuned"
    model.save_pretrained(base)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and not name.startswith("shared"):
                m, n = parameter.shape
                parameter += 0.2 * torch.randn(m, 2) @ torch.randn(2, n)
            elif parameter.ndim == 1:
                parameter += 0.1
    model.save_pretrained(tuned)
    to = tmp_path / "adapter"
    main(["--base", str(base), "--tuned", str(tuned), "--rank", "2", "--to", str(to)])
    record = json.loads((to / "extraction.json").read_text())
    assert not record["not in the adapter"]
    ids = torch.arange(4, 20)[None]

    def answer(of: Any) -> torch.Tensor:
        with torch.no_grad():
            return of(input_ids=ids, decoder_input_ids=ids).logits

    read = AutoModelForSeq2SeqLM.from_pretrained
    theirs = peft.PeftModel.from_pretrained(read(base), to).eval()
    ours = load_adapter(read(base), to).eval()
    for found in (answer(theirs), answer(ours)):
        torch.testing.assert_close(found, answer(model), rtol=1e-3, atol=1e-3)
    shutil.rmtree(to)
