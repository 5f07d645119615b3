"""PEFT's settings, of `adapter_config.json` or of its Python classes, as a `LoraConfig`.

What they mean here is said once, in `lora_fields`. A file describes tensors that are there; an
object describes adapters that are to start, so its initialisation counts, and its defaults are
PEFT's (r 8, lora_alpha 8, the target modules of PEFT's table). PEFT is not imported: an object of
its classes is known by where its class is from.
"""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Mapping
from dataclasses import fields, replace
from enum import Enum
from typing import Any

from torch import nn

from dlora.adapters.peft_format import NO_TARGETS
from dlora.errors import UsageError
from dlora.lora.config import LoraConfig
from dlora.lora.foreign import check_none_of_peft
from dlora.lora.peft_arguments import check_unused
from dlora.lora.targets import target_paths
from dlora.lora.variants.adalora import AdaLoraConfig

# PEFT's initialisations that mean the same here; each starts at ΔW = 0 beside the untouched W0.
_INITS = (True, "gaussian", "orthogonal", "pissa")
_ADALORA = ("init_r", "target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight")
_TABLES = {
    "LORA": "TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING",
    "ADALORA": "TRANSFORMERS_MODELS_TO_ADALORA_TARGET_MODULES_MAPPING",
}


def lora_fields(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `LoraConfig` that PEFT's settings mean, but for the initialisation.

    Args:
        raw: settings by PEFT's names; what is missing has PEFT's default.
    """
    modules_to_save = tuple(raw.get("modules_to_save") or ())
    return {
        "r": raw.get("r", 8),
        "lora_alpha": raw.get("lora_alpha", 8),
        "lora_dropout": raw.get("lora_dropout") or 0.0,
        "target_modules": _targets(raw.get("target_modules"), modules_to_save),
        "use_rslora": bool(raw.get("use_rslora")),
        "use_dora": bool(raw.get("use_dora")),
        "rank_pattern": raw.get("rank_pattern") or {},
        "alpha_pattern": raw.get("alpha_pattern") or {},
        "modules_to_save": list(modules_to_save),
        "target_parameters": raw.get("target_parameters") or [],
        "exclude_modules": raw.get("exclude_modules") or None,
        "layers_to_transform": raw.get("layers_to_transform"),
        "layers_pattern": raw.get("layers_pattern") or None,
        "task_type": raw.get("task_type"),
        "strict_names": False,
    }


def config_for(model: nn.Module, config: Any) -> LoraConfig:
    """The settings with which `dlora.attach` is called, as dlora's own.

    Args:
        config: of dlora's classes, or of PEFT's `LoraConfig` or `AdaLoraConfig`, with PEFT's
            meaning: names that match nothing are ignored if others match, with a warning.

    Raises:
        UsageError: it is neither, or PEFT's uses something that dlora does not have.
    """
    if isinstance(config, LoraConfig):
        return config
    cls = type(config)
    if not any(base.__module__.partition(".")[0] == "peft" for base in cls.__mro__):
        raise UsageError(f"attach: expected a LoraConfig, of dlora or of peft, got {cls.__name__}")
    check_none_of_peft(model)
    try:
        return _names_checked(model, _of_peft(model, config))
    except UsageError as error:
        raise UsageError(f"peft.{cls.__name__}: {error}") from None


def _of_peft(model: nn.Module, config: Any) -> LoraConfig:
    raw = {field.name: _plain(getattr(config, field.name)) for field in fields(config)}
    kind = raw.get("peft_type")
    if kind not in _TABLES:
        raise UsageError(f"peft_type: {kind} is not supported; LORA and ADALORA are")
    check_unused(raw)
    if getattr(raw.get("runtime_config"), "ephemeral_gpu_offload", False):
        raise UsageError("runtime_config: ephemeral_gpu_offload is not supported")
    if raw.get("inference_mode"):
        raise UsageError("inference_mode: True would train nothing; dlora.load_adapter loads one")
    if raw["target_modules"] is None:
        raw["target_modules"] = _usual_targets(model, kind, bool(raw.get("target_parameters")))
    given = lora_fields(raw)
    if kind == "ADALORA":
        del given["r"]
        own = {name: raw[name] for name in _ADALORA}
        return AdaLoraConfig(**given, **own, total_step=raw["total_step"])
    init = raw["init_lora_weights"]
    init = init.lower() if isinstance(init, str) else init
    if not any(init is known or init == known for known in _INITS if type(init) is type(known)):
        raise UsageError(
            f"init_lora_weights: {init!r} is not supported here; expected one of "
            f"{', '.join(map(str, _INITS))}, or milora and lora_ga in a dlora.LoraConfig"
        )
    return LoraConfig(**given, init_lora_weights=init)


def _usual_targets(model: nn.Module, kind: str, has_parameters: bool) -> list[str] | str:
    """PEFT's own table of target modules, by the model's type; none beside target parameters."""
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    table = getattr(sys.modules.get("peft.utils"), _TABLES[kind], {})
    if model_type not in table and has_parameters:
        return []
    if model_type not in table:
        raise UsageError(
            f"target_modules: is not set, and PEFT has no usual ones for {model_type or 'a model'}"
            f"{'' if model_type else ' that transformers does not know'}"
        )
    found = table[model_type]
    return found if isinstance(found, str) else list(found)


def _names_checked(model: nn.Module, config: LoraConfig) -> LoraConfig:
    """The settings, after a warning about a name that means nothing in this model.

    Raises:
        UsageError: a target cannot carry an adapter, or none of the names means anything.
    """
    target_paths(model, config)
    try:
        target_paths(model, replace(config, strict_names=True))
    except UsageError as error:
        warnings.warn(f"attach: {error}; ignored, as PEFT does", stacklevel=4)
    return config


def _plain(value: Any) -> Any:
    """Sets as lists, enumerations as their values."""
    if isinstance(value, Enum):
        return value.value
    return sorted(value) if isinstance(value, set | frozenset) else value


def _targets(raw: Any, modules_to_save: tuple[str, ...]) -> str | list[str]:
    """PEFT's own rule drops what `modules_to_save` names from a list (as all-linear leaves it)."""
    if raw == NO_TARGETS:
        return []
    if isinstance(raw, str):
        return raw.lower() if raw.lower() == "all-linear" else raw
    saved = [re.compile(rf"(.*\.)?{name}(\..*)?") for name in modules_to_save]
    return sorted(n for n in raw or () if not any(s.fullmatch(n) for s in saved))
