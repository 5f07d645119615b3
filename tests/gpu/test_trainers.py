"""float16 under transformers' Trainer and under Accelerate, which scale losses on GPUs alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import get_peft_model
from safetensors.torch import load_file
from tiny import save_model, whole
from transformers import Trainer, TrainingArguments

from dlora import attach, shard

FOUND = torch.__version__
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason=f"no GPU; torch is {FOUND}")
CONFIG = PeftConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=True)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("base") / "model", "llama", torch.float32)


def rows() -> list[dict[str, torch.Tensor]]:
    draw = torch.Generator().manual_seed(0)
    drawn = [torch.randint(0, 250, (12,), generator=draw) for _ in range(16)]
    return [{"input_ids": ids, "labels": ids} for ids in drawn]


def arguments(directory: Path) -> TrainingArguments:
    return TrainingArguments(
        str(directory),
        per_device_train_batch_size=4,
        max_steps=6,
        learning_rate=2e-3,
        logging_steps=1,
        fp16=True,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        seed=3,
    )


def losses(trainer: Trainer) -> list[float]:
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def test_trainer_in_float16_is_peft_s(base: Path, tmp_path: Path) -> None:
    """The same losses to float16's rounding, and an adapter that moved and is finite."""
    from dlora.integrations.transformers import DloraTrainer

    torch.manual_seed(0)
    theirs = get_peft_model(whole(str(base)), CONFIG)
    start = {n: p.detach().clone() for n, p in theirs.named_parameters() if p.requires_grad}
    reference = Trainer(model=theirs, args=arguments(tmp_path / "peft"), train_dataset=rows())
    reference.train()
    ours = attach(whole(str(base)), CONFIG)
    for name, parameter in ours.named_parameters():
        if parameter.requires_grad:
            path, _, factor = name.partition(".adapter.")
            with torch.no_grad():
                parameter.copy_(start[f"base_model.model.{path}.{factor}.default.weight"])
    trainer = DloraTrainer(model=ours, args=arguments(tmp_path / "dlora"), train_dataset=rows())
    trainer.train()
    assert losses(trainer) == pytest.approx(losses(reference), rel=2e-3)
    trainer.save_model(str(tmp_path / "saved"))
    saved = load_file(tmp_path / "saved/adapter_model.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in saved.values())
    assert any(tensor.any() for name, tensor in saved.items() if "lora_B" in name)


def test_accelerate_in_float16_skips_what_overflows(base: Path) -> None:
    """A scale that is too large costs a step, which changes nothing; the next ones train."""
    from accelerate import Accelerator
    from accelerate.utils import GradScalerKwargs

    from dlora.integrations.accelerate import prepare

    scaler: Any = GradScalerKwargs(init_scale=2.0**40, growth_interval=1000)
    accelerator = Accelerator(mixed_precision="fp16", kwargs_handlers=[scaler])
    model = attach(whole(str(base)), CONFIG)
    replica = shard(model, device=accelerator.device)
    optimizer = torch.optim.AdamW(replica.parameter_groups(lr=2e-3))
    prepared, stepped = prepare(accelerator, model, optimizer)
    ids = torch.stack([row["input_ids"] for row in rows()]).to(accelerator.device)
    before = {name: p.detach().clone() for name, p in replica.named.items()}
    skipped = 0
    for _ in range(60):
        accelerator.backward(prepared(input_ids=ids, labels=ids).loss)
        accelerator.clip_grad_norm_(prepared.parameters(), 1.0)
        stepped.step()
        stepped.zero_grad()
        if stepped.step_was_skipped:
            skipped += 1
            assert all(torch.equal(p, before[name]) for name, p in replica.named.items())
        else:
            break
    assert 0 < skipped < 60
    assert any(not torch.equal(p, before[name]) for name, p in replica.named.items())
