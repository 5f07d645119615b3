"""`DloraTrainer` beside PEFT under the stock `Trainer`."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hugging_face import arguments, fresh_state, losses, lora, peft_model, same_start, sequences, written
from ranks import Pools
from tiny import whole
from transformers import Trainer

import dlora
from dlora.integrations.transformers import DloraTrainer


def reference(base: str, directory: Path) -> list[float]:
    fresh_state()
    trainer = Trainer(peft_model(base), arguments(directory), train_dataset=sequences())
    trainer.train()
    return losses(trainer)


def first(base: str, directory: Path, engine: str):
    fresh_state()
    model = whole(base)
    dlora.attach(model, dlora.LoraConfig(r=4, lora_alpha=8))
    same_start(model)
    trainer = DloraTrainer(
        model,
        arguments(directory),
        train_dataset=sequences(),
        sharding={"engine": engine, "base": "world"},
    )
    trainer.train()
    trainer.save_model()
    return losses(trainer), trainer.replica.reductions


def test_losses(pools: Pools, saved_models: Any, tmp_path: Path) -> None:
    base = saved_models("llama")
    expected = pools(1).run(reference, base, tmp_path / "peft")[0]
    print(expected)
    for n in (1, 2):
        got = pools(n).run(first, base, tmp_path / f"{n}", "fsdp2")
        print(got)
