"""PEFT's files with the names of the base's own files, for the text part of a composite model.

    model.layers.0.…                  Qwen3_5ForCausalLM, which dlora trains and PEFT then loads
    model.language_model.layers.0.…   the files, and Qwen3_5ForConditionalGeneration: vLLM and PEFT

No names fit both classes, so the adapter of the one is written for the other where that is asked.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from dlora.adapters.peft_names import PREFIX
from dlora.errors import UsageError
from dlora.lora.attach import attachment_of, named_copies

Files = tuple[dict[str, Any], dict[str, Tensor]]
_FACTORS = ".lora_"


def whole_class(model: nn.Module, config: Any) -> str | None:
    """The class of the composite model that `model` is the text part of; None if it is whole.

    Args:
        config: of the base's files.
    """
    names = getattr(config, "architectures", None) or [None]
    is_part = hasattr(config, "text_config") and names[0] != _class_name(model)
    return names[0] if is_part else None


def part_line(model: nn.Module, config: Any) -> str | None:
    """What to say of an adapter of a composite model's text part; None of others."""
    if (whole := whole_class(model, config)) is None:
        return None
    return (
        f"the adapter is one of {_class_name(model)}, which AutoModelForCausalLM loads; for "
        f"{whole}, which vLLM loads, export it with --layout checkpoint"
    )


def adapted_names(model: nn.Module) -> list[str]:
    """The parameters of the base whose keys in its files name an adapter's tensors."""
    attachment = attachment_of(model)
    if attachment.parameters:
        raise UsageError("--layout: checkpoint has no names for target_parameters")
    copies = [
        f"{path}.{name}" for path, _, c in named_copies(model) for name, _ in c.named_parameters()
    ]
    return [*(f"{path}.weight" for path in attachment.adapted), *copies]


def in_checkpoint_layout(files: Files, keys: Mapping[str, str], whole: str | None) -> Files:
    """Settings and tensors with the names of the base's files.

    Args:
        files: as `lora_files` makes them.
        keys: {name of a parameter: its key in the base's files}, of `adapted_names`.
        whole: the class that the files are for; None: the model's own.
    """
    settings, tensors = files
    paths = {n.removesuffix(".weight"): k.removesuffix(".weight") for n, k in keys.items()}
    renamed = {}
    for key, tensor in tensors.items():
        path, factors, rest = key.removeprefix(PREFIX).partition(_FACTORS)
        renamed[PREFIX + (paths[path] + factors + rest if factors else keys[path])] = tensor
    adapted = {
        key.removeprefix(PREFIX).partition(_FACTORS)[0] for key in tensors if _FACTORS in key
    }
    changed: dict[str, Any] = {
        "target_modules": sorted(paths[path] for path in adapted) or settings["target_modules"],
        "rank_pattern": _by_path(settings["rank_pattern"], settings["r"], paths, adapted),
        "alpha_pattern": _by_path(
            settings["alpha_pattern"], settings["lora_alpha"], paths, adapted
        ),
    }
    if whole is not None:
        changed["task_type"] = None
        changed["auto_mapping"] = {"base_model_class": whole, "parent_library": "transformers"}
    return {**settings, **changed}, renamed


def _by_path(
    pattern: Mapping[str, Any], usual: Any, paths: Mapping[str, str], adapted: set[str]
) -> dict[str, Any]:
    """The values of a pattern by the new paths; longer ones first, since the first match counts."""
    values = {}
    for path in sorted(adapted, key=len, reverse=True):
        value = next((v for e, v in pattern.items() if re.match(rf"(.*\.)?({e})$", path)), usual)
        if value != usual:
            values[re.escape(paths[path])] = value
    return values


def _class_name(model: nn.Module) -> str:
    return type(model).__name__.removeprefix("FSDP")
