"""The `adapter` section as the settings of a method."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path

from torch import nn

from dlora.adapters.hub import adapter_directory
from dlora.adapters.layouts import in_layout_of
from dlora.adapters.mixture import with_experts
from dlora.adapters.peft_config import read_config
from dlora.adapters.write import WEIGHTS
from dlora.config.load import Config
from dlora.config.sections import AdapterConfig
from dlora.errors import UsageError
from dlora.io.files import inside
from dlora.io.safetensors import stored_tensors
from dlora.lora.config import LoraConfig
from dlora.lora.variants import VARIANTS
from dlora.registry import room


def lora_config(config: Config, earlier: LoraConfig | None = None) -> LoraConfig:
    """The `adapter` section, or the configuration of the adapter at `adapter.path`.

    Args:
        earlier: the settings in the checkpoint that a run resumes; they replace those at
            `adapter.path` or `adapter.experts_from` where a directory has been deleted since.
    """
    section = config.adapter
    with keyed_by("adapter"):
        if section.path is not None:
            if earlier is not None and not Path(section.path).expanduser().is_dir():
                return replace(earlier, lora_dropout=section.lora_dropout)
            directory = adapter_directory(section.path)
            return replace(read_config(directory), lora_dropout=section.lora_dropout)
        variant = VARIANTS[section.method]
        names = {field.name for field in fields(variant.settings)} & set(vars(section))
        says = room("lora.variants")[section.method].says
        # The method has no use for these, so there is nothing to set.
        names -= {*says.get("unused", {}), *says.get("instead", {})}
        made = variant.settings(**{name: getattr(section, name) for name in names})
        return with_experts(made, earlier)


def settings_today(model: nn.Module, lora: LoraConfig, directory: Path) -> LoraConfig:
    """The settings of the adapter at `adapter.path` with the names that `model` has today.

    Unchanged where the directory has been deleted since a run began with it.
    """
    file = inside(directory, WEIGHTS)
    if not file.exists():
        return lora
    dropout = lora.lora_dropout
    today, _ = in_layout_of(model, replace(lora, lora_dropout=0.0), stored_tensors(file))
    with keyed_by("adapter"):
        return replace(today, lora_dropout=dropout)


def scheduled(lora: LoraConfig, total_steps: int) -> LoraConfig:
    """The settings for a run of `total_steps` optimizer steps; errors name the section's keys."""
    with keyed_by("adapter"):
        return lora.for_steps(total_steps)


@contextmanager
def keyed_by(section: str) -> Iterator[None]:
    """Inside, a `UsageError` on a field (`r: …`) names the section's key (`adapter.r: …`)."""
    try:
        yield
    except UsageError as error:
        field = str(error).partition(":")[0].partition("[")[0]
        if field not in AdapterConfig.__dataclass_fields__:
            raise
        raise UsageError(f"{section}.{error}") from None
