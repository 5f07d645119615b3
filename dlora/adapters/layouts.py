"""Names in PEFT's files of an older layout of the model: transformers' own renamings.

    written for                             module in the file           in the class today
    Llava before transformers 4.52          language_model.model.layers  model.language_model.layers
    the text part of a composite Qwen3.5    model.language_model.layers  model.layers

transformers moves modules between versions, and renames the keys of base checkpoints while it
loads them. PEFT applies the same rules to its files, and so does this.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from dlora.adapters.peft_names import PREFIX
from dlora.adapters.stacked_experts import stack_experts
from dlora.io.safetensors import StoredTensor
from dlora.lora.config import LoraConfig
from dlora.lora.layers import layer_kind
from dlora.lora.parameters import shape_of

_EXPERT = re.compile(r"\.experts\.\d+\.\w+$")
_FACTORS = ".lora_"  # before the names of PEFT's own tensors


def in_layout_of(
    model: nn.Module, config: LoraConfig, tensors: Mapping[str, StoredTensor]
) -> tuple[LoraConfig, dict[str, StoredTensor]]:
    """Settings and tensors of a PEFT file, with the names that the model has for them today.

    A name stays where the model has it, or where no rule leads to one that it has.

    Raises:
        UsageError: see `stack_experts`.
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
            # Of one expert of a stack the module is not there, but the list of all is.
            there = moved in known or _EXPERT.sub(".experts", moved) in modules
            key = f"{PREFIX}{moved}{factors}{rest}" if there else key
        renamed[key] = tensor

    config = _named_today(config, modules, rename)
    return stack_experts(model, _with_routers(model, config, renamed), renamed)


def _named_today(config: LoraConfig, modules: set[str], rename: Callable[[str], str]) -> LoraConfig:
    """Settings with the paths of today in place of old ones; names and expressions stay."""

    def today(path: str) -> str:
        known = any(f".{module}".endswith(f".{path}") for module in modules)
        moved = path if known else rename(f"{path}.weight").removesuffix(".weight")
        return moved if moved in modules else path

    def with_paths_of_today(pattern: dict[str, Any]) -> dict[str, Any]:
        paths = {expression: expression.replace("\\", "") for expression in pattern}
        return {
            e if today(path) == path else re.escape(today(path)): pattern[e]
            for e, path in paths.items()
        }

    changed: dict[str, Any] = {
        "rank_pattern": with_paths_of_today(config.rank_pattern),
        "alpha_pattern": with_paths_of_today(config.alpha_pattern),
    }
    if not isinstance(config.target_modules, str):
        changed["target_modules"] = [today(path) for path in config.target_modules]
    return replace(config, **changed)


def _with_routers(
    model: nn.Module, config: LoraConfig, tensors: Mapping[str, StoredTensor]
) -> LoraConfig:
    """Settings that adapt the weight of what was a linear layer once, as a mixture's router was."""
    paths = {key.removeprefix(PREFIX).partition(_FACTORS)[0] for key in tensors}
    own = getattr(model, "dlora", None)
    routers = [
        path
        for path, module in model.named_modules()
        if path in paths
        and (own is None or path not in own.modules)
        and not isinstance(module, (nn.Linear, nn.Embedding))
        and layer_kind(module) is None
        and [len(shape_of(p)) for p in module.parameters(recurse=False)][:1] == [2]
        and "weight" in module._parameters
    ]
    parameters = [f"{path}.weight" for path in routers]
    if not routers or set(parameters) <= set(config.target_parameters):
        return config
    excluded = config.exclude_modules or []
    if isinstance(excluded, str):
        excluded = "|".join([f"({excluded})", *map(re.escape, routers)])
    else:
        excluded = [*excluded, *routers]
    if config.lora_dropout:
        warnings.warn("the routers' lora_dropout is 0: none acts on a weight", stacklevel=4)
    return replace(
        config,
        target_parameters=[*config.target_parameters, *parameters],
        exclude_modules=excluded,
        lora_dropout=0.0,
    )


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
