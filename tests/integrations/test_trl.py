"""TRL's trainers with dlora's adapters: the losses of PEFT's, and the same reference."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from hugging_face import arguments, fresh_state, losses, peft_model, same_start, written
from ranks import Pools
from tiny import tokenizer, whole
from transformers import AutoModelForSequenceClassification
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
)

import dlora
from dlora import LoraConfig
from dlora.integrations.trl import (
    DloraDPOTrainer,
    DloraGRPOTrainer,
    DloraKTOTrainer,
    DloraRewardTrainer,
    DloraSFTTrainer,
)

KINDS = {
    "sft": (SFTConfig, SFTTrainer, DloraSFTTrainer),
    "dpo": (DPOConfig, DPOTrainer, DloraDPOTrainer),
    "kto": (KTOConfig, KTOTrainer, DloraKTOTrainer),
    "reward": (RewardConfig, RewardTrainer, DloraRewardTrainer),
    "grpo": (GRPOConfig, GRPOTrainer, DloraGRPOTrainer),
}
OWN = {
    "grpo": {
        "num_generations": 2,
        "max_completion_length": 6,
        "beta": 0.1,
        "temperature": 1e-4,  # the likeliest token, so that no random state matters
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
    },
    "kto": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 1},
}


def records(kind: str) -> Dataset:
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight"]
    rows = []
    for index in range(8):
        said = " ".join(words[: 1 + index % 4])
        row = {
            "sft": {"text": f"{said} and {words[index]}"},
            "dpo": {"prompt": said, "chosen": f" {words[index]}", "rejected": " nothing"},
            "kto": {"prompt": said, "completion": f" {words[index]}", "label": index % 2 == 0},
            "reward": {"chosen": f"{said} {words[index]}", "rejected": f"{said} nothing"},
            "grpo": {"prompt": said},
        }
        rows.append(row[kind])
    return Dataset.from_list(rows)


def rewards(completions: list[str], **_: Any) -> list[float]:
    return [float(sum(map(ord, text)) % 7) for text in completions]


def base_of(kind: str, path: str) -> Any:
    if kind != "reward":
        return whole(path)
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(path, num_labels=1)
    with torch.no_grad():
        model.score.weight.copy_(torch.linspace(-1, 1, model.score.weight.numel())[None])
    return model


def trained(kind: str, path: str, directory: Path, sharding: dict[str, Any] | None) -> Any:
    """A short run: of PEFT's adapters where `sharding` is None."""
    fresh_state()
    config, stock, ours = KINDS[kind]
    own = {"max_length": 32} if kind != "grpo" else {}
    ranks = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    settings = OWN.get(kind, {})
    if "per_device_train_batch_size" in settings:
        each = settings["per_device_train_batch_size"]
        settings = settings | {"per_device_train_batch_size": each // ranks}
    args = arguments(directory, config, max_steps=3, **own | settings)
    model, task = base_of(kind, path), {"task_type": "SEQ_CLS"} if kind == "reward" else {}
    given = {"args": args, "train_dataset": records(kind), "processing_class": tokenizer()}
    given |= {"reward_funcs": rewards} if kind == "grpo" else {}
    if sharding is None:
        trainer = stock(peft_model(model, **task), **given)
    else:
        dlora.attach(model, LoraConfig(r=4, lora_alpha=8))
        same_start(model)
        trainer = ours(model, sharding=sharding, **given)
    trainer.train()
    trainer.save_model()
    bases = {id(m) for m in vars(trainer).values() if isinstance(m, type(model))}
    return losses(trainer), len(bases)


def compare(kind: str, pools: Pools, base: str, directory: Path, runs: list[Any]) -> None:
    wanted, _ = pools(1).run(trained, kind, base, directory / "peft", None)[0]
    assert len(set(wanted)) > 1
    for ranks, engine in runs:
        ours = directory / f"{engine}{ranks}"
        found = pools(ranks).run(trained, kind, base, ours, {"engine": engine, "base": "world"})
        for got, bases in found:
            assert bases == 1  # the reference is no second one
            assert got == pytest.approx(wanted, rel=1e-5, abs=1e-7), (ranks, engine)
        one, other = written(directory / "peft"), written(ours)
        assert one.keys() == other.keys()
        for name, tensor in one.items():
            assert torch.linalg.norm(tensor - other[name]) <= 1e-3 * torch.linalg.norm(tensor), name


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_losses_are_those_of_trl_with_peft(
    kind: str, pools: Pools, saved_models: Any, tmp_path: Path
) -> None:
    runs = [(1, "fsdp2"), (2, "fsdp2"), (2, "zero3")]
    compare(kind, pools, saved_models("llama"), tmp_path, runs)


@pytest.mark.parametrize("kind", ["kto", "reward", "grpo"])
def test_losses_of_the_others(kind: str, pools: Pools, saved_models: Any, tmp_path: Path) -> None:
    compare(
        kind, pools, saved_models("llama"), tmp_path, [(1, "fsdp2"), (2, "fsdp2"), (2, "zero3")]
    )
