"""Adapters on disk, in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`.

Stock PEFT loads what is written here, and what it writes is loaded here; see `peft_format.py` for
what is in the files.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dlora.adapters.base_copies import same_base, take_base_copies
from dlora.adapters.diffusers_format import (
    LORA_WEIGHTS,
    diffusers_file,
    header,
    is_of_diffusers,
)
from dlora.adapters.hub import adapter_directory
from dlora.adapters.layouts import in_layout_of
from dlora.adapters.mixture import fill_mixture, has_mixture, is_mixture, mixture_of, write_mixture
from dlora.adapters.peft_config import check_numbers, read_config
from dlora.adapters.peft_format import adalora_files, lora_files
from dlora.adapters.peft_names import PREFIX, peft_slots
from dlora.adapters.write import CONFIG, WEIGHTS, recorded_name, write_files
from dlora.errors import UsageError, and_more
from dlora.io.files import inside
from dlora.io.safetensors import StoredTensor, stored_tensors
from dlora.lora.attach import attachment_of, frozen_tensors, named_adapters
from dlora.lora.config import LoraConfig
from dlora.lora.layers import layer_kind
from dlora.lora.names import by_name
from dlora.lora.several import DEFAULT
from dlora.lora.targets import module_paths
from dlora.methods.attach import attach

FORMS = {"LORA": lora_files, "ADALORA": adalora_files}  # by PEFT's name


def save_adapter(
    model: nn.Module,
    directory: str | Path,
    *,
    base_model_name_or_path: str | None = None,
    peft_type: str = "LORA",
    name: str = DEFAULT,
) -> None:
    """Write the adapter of `model` so that stock PEFT loads it. Any rank may, without a collective.

    A mixture of experts (mola) has a directory for each of them instead, see `mixture`. Of a model
    of diffusers the file that its pipelines load is written too.

    Args:
        name: of the adapters; without one, of those that were attached so.
        directory: created if need be; each file is written beside its place and renamed.
        base_model_name_or_path: recorded in the configuration, a path as an absolute one; by
            default the model's own.
        peft_type: `"LORA"`: a plain LoRA with the same logits, whatever the adapter's form;
            `"ADALORA"`: AdaLoRA's own form, of the triplets that are left.

    Raises:
        UsageError: nothing is attached, a tensor is empty, or `peft_type` does not fit the adapter.
    """
    if peft_type not in FORMS:
        raise UsageError(f"peft_type: expected one of {', '.join(FORMS)}, got {peft_type!r}")
    base = base_model_name_or_path or getattr(getattr(model, "config", None), "name_or_path", None)
    if name == DEFAULT:
        attachment_of(model)
    with by_name(model, name):
        if is_mixture(model):
            if peft_type != "LORA":
                raise UsageError(
                    f"peft_type: {peft_type} has no form for a mixture of experts (mola)"
                )
            write_mixture(model, directory, base and recorded_name(base))
            return
        settings, tensors = adapter_files(model, base, peft_type)
        metadata, beside = None, {}
        if is_of_diffusers(model) and peft_type == "LORA":
            metadata = header(settings, PREFIX)
            if (content := diffusers_file(model, settings, tensors)) is not None:
                beside[LORA_WEIGHTS] = content
    write_files(directory, settings, tensors, metadata, beside)


def adapter_files(
    model: nn.Module, base: str | None, peft_type: str = "LORA"
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The settings and tensors that `save_adapter` writes."""
    settings, tensors = FORMS[peft_type](model, base and recorded_name(base))
    for key, tensor in tensors.items():
        if tensor.numel() == 0 and peft_type == "LORA":  # PEFT's AdaLoRA has modules of rank 0
            raise UsageError(f"save_adapter: {key} is empty; refusing to write it")
    return settings, tensors


def load_adapter(model: nn.Module, directory: str | Path) -> nn.Module:
    """Load an adapter that dlora or PEFT wrote; attaches it first where nothing is attached.

    Names are matched as PEFT's loader does: a target, a pattern or a module to save that the model
    lacks is ignored, and those of an older layout of the model are renamed.

    Args:
        directory: of PEFT's files, or the id of a repository of the Hugging Face hub.

    Returns:
        `model`.

    Raises:
        UsageError: a file is missing or damaged, is no LoRA, uses something that dlora does not
            have, contains NaN or infinite values, or does not fit the model; the message names
            the file and the key.
    """
    found = adapter_directory(directory, "load_adapter")
    if has_mixture(found):
        config = mixture_of(found)
        if not hasattr(model, "dlora"):
            attach(model, config)
        fill_mixture(model, found, config)
        return model
    stored = read_stored(model, found)
    if not hasattr(model, "dlora"):
        stored.check_ranks(model)
        attach(model, stored.config)
    stored.fill(slots_for(model, stored))
    return model


@dataclass(frozen=True)
class StoredAdapter:
    """The files of an adapter, with the names that a model has for what is in them."""

    directory: Path
    config: LoraConfig
    tensors: dict[str, StoredTensor]

    @property
    def file(self) -> Path:
        """Of the tensors."""
        return inside(self.directory, WEIGHTS)

    def check_ranks(self, model: nn.Module) -> None:
        """Check that every r is that of a tensor, before tensors of that size are allocated."""
        _check_ranks(model, self.config, self.file, self.tensors)

    @torch.no_grad()
    def fill(self, slots: Mapping[str, Tensor]) -> None:
        """Read the values into the tensors of `slots_for`."""
        for key, slot in slots.items():
            slot.copy_(self.tensors[key].rows().view(slot.shape))


def read_stored(model: nn.Module, directory: str | Path) -> StoredAdapter:
    """Read the settings, and check the numbers, of an adapter; see `load_adapter`."""
    directory = adapter_directory(directory, "load_adapter")
    file = inside(directory, WEIGHTS)
    config, tensors = in_layout_of(model, read_config(directory), stored_tensors(file))
    buffers = {PREFIX + name for name, _ in model.named_buffers()}
    check_numbers({key: tensor for key, tensor in tensors.items() if key not in buffers})
    return StoredAdapter(directory, config, tensors)


def slots_for(model: nn.Module, stored: StoredAdapter) -> dict[str, Tensor]:
    """The model's own tensors by the keys of a file that fits them; nothing is changed.

    Raises:
        UsageError: it does not fit the adapters that are meant, or was trained on another base.
    """
    directory, config, file, tensors = stored.directory, stored.config, stored.file, stored.tensors
    if (method := attachment_of(model).config.method) != "lora":
        raise UsageError(
            f"load_adapter: {directory} is a plain LoRA, but the model has {method} adapters; load "
            "it into a model without adapters"
        )
    if frozen_tensors(model):
        init = attachment_of(model).config.init_lora_weights
        raise UsageError(
            f"load_adapter: the model's adapters were initialised with {init}, so they cannot take "
            f"over the plain LoRA in {directory}; load it into a model without adapters"
        )
    expected = peft_slots(model)
    base_copies = take_base_copies(model, tensors, expected)
    check_shapes(file, {key: t.shape for key, t in tensors.items()}, expected)
    for key, (copy, base) in base_copies.items():
        if not same_base(copy, base):
            raise UsageError(
                f"{file}: {key} differs from this model's weight; the adapter was "
                "trained on another base"
            )
    for path, _, adapter in named_adapters(model):
        if not math.isclose(adapter.scaling, config.scaling_for(path)):
            raise UsageError(
                f"{directory / CONFIG}: lora_alpha, r and use_rslora scale {path} by "
                f"{config.scaling_for(path):g}, but the attached adapter is scaled by "
                f"{adapter.scaling:g}; attach it with the same settings"
            )
    return expected


def check_shapes(
    path: Path, stored: Mapping[str, Sequence[int]], expected: Mapping[str, Tensor]
) -> None:
    """Raise a `UsageError` unless a file's tensors, {key: shape}, are those that are expected."""
    missing, extra = expected.keys() - stored.keys(), stored.keys() - expected.keys()
    if missing or extra:
        what, keys = ("lacks", missing) if missing else ("has the unexpected", extra)
        raise UsageError(f"{path}: {what} {and_more(sorted(keys))}")
    for key, slot in expected.items():
        if tuple(stored[key]) != slot.shape:
            raise UsageError(
                f"{path}: {key} has shape {list(stored[key])}, the model expects {list(slot.shape)}"
            )


def _check_ranks(
    model: nn.Module, config: LoraConfig, file: Path, tensors: Mapping[str, StoredTensor]
) -> None:
    """Check that every r is that of a stored tensor, before tensors of that size are allocated."""
    for path in module_paths(model, config):
        kind = layer_kind(model.get_submodule(path))
        name = "lora_embedding_A" if kind and kind.is_embedding else "lora_A.weight"
        stored, r = tensors.get(key := f"{PREFIX}{path}.{name}"), config.r_for(path)
        if stored is not None and stored.shape[:1] != (r,):
            raise UsageError(
                f"{file}: {key} has shape {list(stored.shape)}, but r is {r} in {CONFIG}"
            )
        if stored is None:
            raise UsageError(f"{file}: lacks {key}")
