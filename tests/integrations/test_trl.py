"""TRL's trainers with dlora's adapters: the losses of PEFT's, and the same reference."""

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from hugging_face import arguments, fresh_state, lora, losses, peft_model, same_start, written
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
from dlora import LoraConfig, UsageError
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
# Batches of a rank from which these compute a mean of their own, so not the same on 1 and 2 ranks.
OF_A_RANK = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 1}
OWN = {
    "kto": OF_A_RANK,
    "grpo": OF_A_RANK | {"num_generations": 2, "max_completion_length": 6, "beta": 0.1},
}


RESUMED = {("sft", 2, "fsdp2"), ("dpo", 2, "zero3")}


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
    args = arguments(directory, config, max_steps=3, **own | OWN.get(kind, {}))
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


@pytest.mark.parametrize("kind", KINDS)
def test_losses_are_those_of_trl_with_peft(
    kind: str, pools: Pools, saved_models: Any, tmp_path: Path
) -> None:
    """Of TRL in one process; those with means of a rank's own, of TRL on as many ranks."""
    base, peft = saved_models("llama"), {}
    for ranks, engine in ((1, "fsdp2"), (2, "fsdp2"), (2, "zero3")):
        alike = ranks if kind in OWN else 1
        if alike not in peft:
            peft[alike] = pools(alike).run(trained, kind, base, tmp_path / f"peft{alike}", None)
        ours = tmp_path / f"{engine}{ranks}"
        sharding = {"engine": engine, "base": "world"}
        wanted = peft[alike][0][0]
        assert len(set(wanted)) > 1
        for got, bases in pools(ranks).run(trained, kind, base, ours, sharding):
            assert bases == 1  # the reference is no second one
            assert got == pytest.approx(wanted, rel=1e-5, abs=1e-7), (ranks, engine)
        one, other = written(tmp_path / f"peft{alike}"), written(ours)
        assert one.keys() == other.keys()
        for name, tensor in one.items():
            apart = torch.linalg.norm(tensor - other[name])
            assert apart <= 1e-3 * torch.linalg.norm(tensor), name


def resumed(kind: str, path: str, directory: Path, engine: str) -> bool:
    """Four steps, and the last two again from the checkpoint after two; whether all is equal."""
    found = []
    for name in ("straight", "resumed"):
        fresh_state()
        config, _, ours = KINDS[kind]
        own = OWN.get(kind, {}) | {"save_strategy": "steps", "save_steps": 2}
        trainer = ours(
            path if kind == "sft" else base_of(kind, path),
            args=arguments(directory / name, config, **own),
            train_dataset=records(kind),
            processing_class=tokenizer(),
            peft_config=lora(lora_dropout=0.2, task_type=None),
            sharding={"engine": engine, "base": "world", "optimizer_state": "divided"},
            **({"reward_funcs": rewards} if kind == "grpo" else {}),
        )
        half = str(directory / "straight" / "checkpoint-2")
        trainer.train(resume_from_checkpoint=half if name == "resumed" else None)
        found.append(trainer)
    pairs = zip(*(trainer.replica.named.values() for trainer in found), strict=True)
    return all(torch.equal(one, other) for one, other in pairs)


@pytest.mark.parametrize(
    ("kind", "ranks", "engine"),
    [
        pytest.param(*case, marks=() if case in RESUMED else pytest.mark.full)
        for case in product(KINDS, (1, 2), ("fsdp2", "zero3"))
    ],
)
def test_a_resumed_run_ends_where_the_uninterrupted_one_does(
    kind: str, ranks: int, engine: str, pools: Pools, saved_models: Any, tmp_path: Path
) -> None:
    assert all(pools(ranks).run(resumed, kind, saved_models("llama"), tmp_path, engine))
    checkpoint = tmp_path / "resumed" / "checkpoint-4"
    assert not (checkpoint / "model.safetensors").exists()
    for name, tensor in written(checkpoint).items():
        assert torch.equal(tensor, written(tmp_path / "straight" / "checkpoint-4")[name])


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("dpo", {"precompute_ref_log_probs": True}, "precompute_ref_log_probs: the reference is"),
        ("dpo", {"sync_ref_model": True}, "sync_ref_model: the reference is the model itself"),
        ("grpo", {"use_vllm": True}, "use_vllm: vLLM is sent"),
    ],
)
def test_what_needs_a_second_base_is_refused(
    kind: str, settings: dict[str, Any], message: str, saved_models: Any, tmp_path: Path
) -> None:
    config, _, ours = KINDS[kind]
    given = {"reward_funcs": rewards} if kind == "grpo" else {}
    args = arguments(tmp_path, config, **OWN.get(kind, {}) | settings)
    with pytest.raises(UsageError, match=message):
        ours(whole(saved_models("llama")), args=args, train_dataset=records(kind), **given)
