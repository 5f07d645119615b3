"""Names in PEFT's files of an older layout of the model: transformers' own renamings.

    written for                             module in the file           in the class today
    Llava before transformers 4.52          language_model.model.layers  model.language_model.layers
    the text part of a composite Qwen3.5    model.language_model.layers  model.layers

transformers moves modules between versions, and renames the keys of base checkpoints while it
loads them. PEFT applies the same rules to its files, and so does this.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, TypeVar

from torch import nn

from dlora.adapters.peft_format import PREFIX
from dlora.lora.config import LoraConfig

T = TypeVar("T")
_FACTORS = ".lora_"  # before the names of PEFT's own tensors


def in_layout_of(model: nn.Module, tensors: Mapping[str, T]) -> dict[str, T]:
    """The tensors of a PEFT file by the keys that the model has for them today.

    A key stays where the model has its module, or where no rule leads to one that it has.
    """
    rename = _renaming(model)
    modules = {path for path, _ in model.named_modules()}
    parameters = {name for name, _ in model.named_parameters()}
    renamed = {}
    for key, tensor in tensors.items():
        path, factors, rest = key.removeprefix(PREFIX).partition(_FACTORS)
        known = modules if factors else parameters  # `modules_to_save` are stored by parameters
        if key.startswith(PREFIX) and path not in known:
            moved = rename(path + factors + rest).partition(_FACTORS)[0]
            key = f"{PREFIX}{moved}{factors}{rest}" if moved in known else key
        renamed[key] = tensor
    return renamed


def config_in_layout_of(model: nn.Module, config: LoraConfig) -> LoraConfig:
    """Settings from a PEFT file with the paths in `target_modules` that the model has today."""
    if isinstance(config.target_modules, str):
        return config
    rename = _renaming(model)
    modules = {path for path, _ in model.named_modules()}

    def today(path: str) -> str:
        known = any(f".{module}".endswith(f".{path}") for module in modules)
        moved = path if known else rename(f"{path}.weight").removesuffix(".weight")
        return moved if moved in modules else path

    return replace(config, target_modules=[today(path) for path in config.target_modules])


def _renaming(model: Any) -> Callable[[str], str]:
    """A function that renames a key of an old checkpoint as transformers does while loading."""
    if not hasattr(getattr(model, "config", None), "model_type"):
        return str
    from transformers import PreTrainedModel
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, apply_renamings

    if not isinstance(model, PreTrainedModel):
        return str
    own = getattr(model, "_checkpoint_conversion_mapping", None)  # of a model with code of its own
    rules = get_model_conversion_mapping(model, key_mapping=own, add_legacy=False)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    return lambda key: apply_renamings(key, renamings)
