"""Sample answers of a model that has learned a limited number of positions."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from run_training import Runs
from tiny import save_chats, tokenizer, whole
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from dlora.data import load_examples
from dlora.tasks import CAUSAL
from dlora.tasks.generation import learned_positions


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
    [(_, wanted, _)] = CAUSAL.answers(model, tokenizer(), data.first(1), pad_id=0)
    assert wanted == "b"


@pytest.mark.parametrize("recomputed", [False, True])
def test_the_held_out_loss_is_that_of_each_sequence_alone(
    run: Runs, saved_models: Any, tmp_path: Path, recomputed: bool
) -> None:
    """Before training, of transformers' own model, whatever a pass takes at once."""
    held = str(save_chats(tmp_path / "held.jsonl", 11))
    settings = {"data__eval": held, "output__eval_every": 1, "train__max_steps": 1}
    recompute = {"sharding__activation_checkpointing": recomputed, "sharding__base": "world"}
    _, lines = run("run", 3, **settings, **recompute)
    data = load_examples(
        held, key="data.eval", format="chat", tokenizer=tokenizer(), max_length=1024
    )
    model, losses, targets = whole(saved_models("llama")), 0.0, 0
    for example in (data[i] for i in range(len(data))):
        labels = torch.from_numpy(example.labels).long()
        logits = model(torch.from_numpy(example.input_ids).long()[None]).logits[0, :-1]
        losses += float(F.cross_entropy(logits, labels[1:], reduction="sum"))
        targets += int((labels[1:] >= 0).sum())
    assert lines[0]["step"] == 0
    assert lines[0]["eval_loss"] == pytest.approx(losses / targets, rel=1e-5)
