"""Runs of transformers' and TRL's trainers for the tests of this folder, on one rank or several."""

import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, GradientState
from peft import LoraConfig as PeftConfig
from peft import get_peft_model
from safetensors.torch import load_file
from tiny import whole
from torch import nn
from transformers import TrainingArguments

WORDS = 12  # of a sequence


def fresh_state() -> None:
    """Accelerate remembers the process group of the process, and Lightning changes the environment
    that describes it; each call of a test has its own."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    for name in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "RANK", "WORLD_SIZE", "LOCAL_RANK"):
        os.environ.pop(name, None)
    os.environ.pop("LOCAL_WORLD_SIZE", None)
    if dist.is_initialized():
        rank, world = str(dist.get_rank()), str(dist.get_world_size())
        os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=world, LOCAL_WORLD_SIZE=world)
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="1")  # nobody connects: there is one


def sequences(count: int = 16, *, uneven: bool = True) -> list[dict[str, Any]]:
    """Random tokens, as a data set; `uneven`: of unlike numbers of targets."""
    draw = torch.Generator().manual_seed(0)
    found = []
    for index in range(count):
        ids = torch.randint(0, 250, (WORDS,), generator=draw)
        labels = ids.clone()
        labels[: 1 + index % 5 if uneven else 1] = -100
        found.append({"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)})
    return found


def same_start(model: nn.Module) -> None:
    """A from the module's name, whichever library made it, and B zero."""
    for name, parameter in model.named_parameters():
        path = name.removeprefix("base_model.model.").split(".lora_")[0].removesuffix(".adapter")
        if "lora_A" in name:
            draw = torch.Generator().manual_seed(sum(path.encode()))
            with torch.no_grad():
                parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.1)


def peft_model(base: str | nn.Module, **settings: Any) -> nn.Module:
    model = get_peft_model(whole(base) if isinstance(base, str) else base, lora(**settings))
    same_start(model)
    return model


def lora(**settings: Any) -> PeftConfig:
    return PeftConfig(**{"r": 4, "lora_alpha": 8, "target_modules": "all-linear"} | settings)


def arguments(directory: Path, kind: Any = TrainingArguments, **settings: Any) -> Any:
    """Of a short run: global batches of 4 sequences in 2 passes over two ranks or one."""
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    common = {
        "output_dir": str(directory),
        "per_device_train_batch_size": 2 // ranks,
        "gradient_accumulation_steps": 2,
        "max_steps": 4,
        "learning_rate": 0.002,
        "lr_scheduler_type": "linear",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "bf16": False,
        "seed": 3,
    }
    return kind(**common | settings)


def losses(trainer: Any) -> list[float]:
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def written(directory: Path | str) -> dict[str, torch.Tensor]:
    return load_file(Path(directory) / "adapter_model.safetensors")
