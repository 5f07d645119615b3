"""The file that diffusers loads: `pytorch_lora_weights.safetensors`, beside PEFT's.

    unet.<path>.lora_{A,B}.weight           of a UNet
    transformer.<path>.lora_{A,B}.weight    of any other model

A pipeline's `load_lora_weights` finds it by its name, and hands each component the keys with its
prefix; a model's own `load_lora_adapter` is told the prefix. The settings are in the file's header:
without them diffusers takes lora_alpha = r.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor, nn

from dlora.adapters.peft_names import PREFIX
from dlora.errors import UsageError, and_more
from dlora.io.files import inside
from dlora.io.safetensors import stored_tensors

LORA_WEIGHTS = "pytorch_lora_weights.safetensors"
_METADATA = "lora_adapter_metadata"


def is_of_diffusers(model: nn.Module) -> bool:
    """Whether the model is one of diffusers'."""
    return any(
        base.__name__ == "ModelMixin" and base.__module__.startswith("diffusers.")
        for base in type(model).__mro__
    )


def header(settings: Mapping[str, Any], prefix: str) -> dict[str, str]:
    """The metadata of a safetensors file with the settings for keys that begin with `prefix`."""
    prefixed = {f"{prefix}{key}": value for key, value in settings.items()}
    return {"format": "pt", _METADATA: json.dumps(prefixed)}


def prefix_in(directory: Path) -> str | None:
    """The prefix of the keys of diffusers' file in an adapter's directory; None: there is no file.

    Raises:
        UsageError: it is damaged, or has the adapters of several models, as those of a pipeline.
    """
    file = inside(directory, LORA_WEIGHTS)
    if not file.is_file():
        return None
    models = sorted({key.partition(".")[0] for key in stored_tensors(file)})
    if len(models) != 1:
        raise UsageError(f"{file}: has adapters of {and_more(models) or 'no model'}, not of one")
    return f"{models[0]}."


def diffusers_file(
    model: nn.Module, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> bytes | None:
    """The content of the file; None, with a warning, if diffusers cannot load such an adapter.

    Args:
        settings, tensors: of PEFT's files.
    """
    if settings["modules_to_save"]:
        warnings.warn(
            f"save_adapter: diffusers loads no modules_to_save, so {LORA_WEIGHTS} is not written",
            stacklevel=3,
        )
        return None
    prefix = "unet." if "UNet" in type(model).__name__ else "transformer."
    renamed = {prefix + key.removeprefix(PREFIX): tensor for key, tensor in tensors.items()}
    return save(renamed, metadata=header(settings, prefix))
