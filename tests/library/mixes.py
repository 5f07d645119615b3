"""Adapters that stock PEFT wrote, the mixes of several, and their updates as PEFT has them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from dlora.library.compose import main


def save_random(model: nn.Module, directory: Path, seed: int, **settings: Any) -> Path:
    """An adapter of PEFT's on a fresh `model`, all of it random."""
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**{"r": 4, "lora_alpha": 6} | settings))
    torch.manual_seed(seed)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, 0, 0.3)
    wrapped.save_pretrained(directory)
    return directory


def updates(model: nn.Module, adapter: str = "default") -> dict[str, Tensor]:
    """{path: ΔW} of one adapter, in float32, as PEFT computes it."""
    return {
        path: module.get_delta_weight(adapter)
        for path, module in model.named_modules()
        if isinstance(module, LoraLayer) and adapter in {*module.lora_A, *module.lora_embedding_A}
    }


def loaded(model: nn.Module, *directories: Path) -> Any:
    """The model with all adapters, named 0, 1, …"""
    found = peft.PeftModel.from_pretrained(model, str(directories[0]), adapter_name="0")
    for number, directory in enumerate(directories[1:], start=1):
        found.load_adapter(str(directory), adapter_name=str(number))
    return found


def composed(
    to: Path, method: str, adapters: Sequence[Path], weights: Sequence[float], *words: str
) -> Path:
    """The result of the command."""
    mix = [f"{adapter}={weight}" for adapter, weight in zip(adapters, weights, strict=True)]
    assert main(["--adapters", *mix, "--method", method, "--to", str(to), *words]) == 0
    return to


def apart(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """The largest ‖a − b‖ / ‖b‖ over the weights, which must be the same ones."""
    assert found.keys() == wanted.keys()
    return max(float((found[p] - wanted[p]).norm() / wanted[p].norm()) for p in wanted)
