"""PEFT's `adapter_config.json` as a `LoraConfig`, and whether its tensors are numbers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from dlora.adapters.peft_settings import lora_fields
from dlora.adapters.write import CONFIG, ROUTER
from dlora.errors import UsageError
from dlora.io.files import inside, read_object
from dlora.io.safetensors import StoredTensor
from dlora.lora.config import LoraConfig
from dlora.lora.peft_arguments import check_unused

# PEFT's initialisations that leave W0 unchanged; the others change the base.
_INITS = (True, False, None, "gaussian", "orthogonal", "eva", "mica")
_KINDS: dict[str, tuple[type, ...]] = {  # types that `LoraConfig` does not check
    "lora_dropout": (float, int),
    "target_modules": (str, list),
    "target_parameters": (list,),
    "exclude_modules": (str, list),
    "layers_pattern": (str, list),
    "modules_to_save": (list,),
    "rank_pattern": (dict,),
    "alpha_pattern": (dict,),
    "base_model_name_or_path": (str,),
    "revision": (str,),
    "task_type": (str,),
}


def check_no_mixture(directory: Path) -> None:
    """Raise a `UsageError` of a directory with a mixture of experts."""
    if inside(directory, ROUTER).exists():
        raise UsageError(
            f"{directory}: is a mixture of experts (mola), and not one plain LoRA; each of its "
            f"{directory / 'experts'}/0, … is"
        )


def read_config(directory: str | Path) -> LoraConfig:
    """The `LoraConfig` of an adapter directory; see `load_adapter` for the errors."""
    path = inside(Path(directory).expanduser(), CONFIG)
    check_no_mixture(path.parent)
    if not path.exists():
        raise UsageError(f"{path}: file not found, so {directory} is not an adapter directory")
    raw = read_object(path)
    if raw.get("peft_type") != "LORA":
        kind = raw.get("peft_type")
        raise UsageError(f"{path}: peft_type is {kind!r}; only LORA can be loaded")
    for key, kinds in _KINDS.items():
        value = raw.get(key)
        items = value if isinstance(value, list) else ()
        if not isinstance(value, (*kinds, type(None))) or any(type(i) is not str for i in items):
            raise UsageError(f"{path}: {key}: {value!r} has an unexpected type")
    try:
        check_unused(raw)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None
    init = raw.get("init_lora_weights", True)
    if (init.lower() if isinstance(init, str) else init) not in _INITS:
        raise UsageError(
            f"{path}: init_lora_weights: {raw['init_lora_weights']!r} rewrites the base; convert "
            "the adapter with PEFT's save_pretrained(path_initial_model_for_weight_conversion=...)"
        )
    try:
        return LoraConfig(**lora_fields(raw))
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None


def check_numbers(tensors: Mapping[str, StoredTensor]) -> None:
    """Raise a `UsageError` unless an adapter's tensors are floats, and finite.

    Copies of W0 are left out: they are compared with the base.
    """
    for key, tensor in tensors.items():
        if not key.endswith(".base_layer.weight"):
            tensor.check_numbers()
