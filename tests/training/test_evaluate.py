"""Sample answers of a model that has learned a limited number of positions."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tokenizer
from transformers import AutoModelForCausalLM

from dlora.data import load_examples
from dlora.training.checks import learned_positions
from dlora.training.evaluate import sample_answers


@pytest.mark.parametrize(("name", "positions"), [("gpt2", 256), ("llama", None)])
def test_answers_end_where_positions_do(
    saved_models: Any, tmp_path: Path, name: str, positions: int | None
) -> None:
    """A prompt of 246 tokens leaves 10 of 256."""
    turns = [{"role": "user", "content": "a" * 227}, {"role": "assistant", "content": "b"}]
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps({"messages": turns}) + "\n")
    reading = {"key": "data.eval", "format": "chat", "max_length": 256}
    data = load_examples(str(path), tokenizer=tokenizer(), **reading)
    assert int((data[0].labels >= 0).argmax()) == 246
    model = AutoModelForCausalLM.from_pretrained(saved_models(name), dtype=torch.float32)
    assert learned_positions(model) == positions
    [(_, wanted, _)] = sample_answers(model, tokenizer(), data, count=1, pad_id=0)
    assert wanted == "b"
