"""The adapter of a model in a directory, and back, with the bits that training needs.

adapter_model.safetensors, adapter_config.json    PEFT's files, whatever the method
dlora_adapter.safetensors                         the training form, where it is another: AdaLoRA
                                                  (its triplets), FLoRA, PiSSA and its like
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from dlora import UsageError, load_adapter, save_adapter
from dlora.api import TrainedReplica

TRAINING_FORM = "dlora_adapter.safetensors"


def save(model: nn.Module, replica: TrainedReplica, directory: str | Path) -> None:
    """Write the adapter. Any rank may, without a collective.

    Raises:
        UsageError: as `dlora.save_adapter`.
    """
    directory = Path(directory)
    save_adapter(model, directory)
    if _is_plain(model, replica):
        return
    tensors = {**replica.named, **replica.frozen}
    copies = {name: t.detach().to("cpu", copy=True).contiguous() for name, t in tensors.items()}
    step, record = getattr(replica.method, "step", 0), replica.method.record()
    beside = directory / f".{TRAINING_FORM}.{os.getpid()}"
    save_file(copies, beside, {"step": str(step), "record": json.dumps(record)})
    os.replace(beside, directory / TRAINING_FORM)


def load(model: nn.Module, replica: TrainedReplica, directory: str | Path) -> None:
    """Put back what `save` wrote. Every rank reads it; collective: ranks compare what they have.

    Raises:
        UsageError: a file is missing, is damaged, or does not fit; it names the file.
    """
    if _is_plain(model, replica):
        load_adapter(model, directory)
    else:
        _load_training_form(replica, Path(directory) / TRAINING_FORM)
    replica.audit()


def fits(model: nn.Module, replica: TrainedReplica, directory: str | Path) -> bool:
    """Whether the shapes in a directory are those of the model: AdaLoRA cuts triplets for good."""
    if _is_plain(model, replica):
        return True
    try:
        with safe_open(Path(directory) / TRAINING_FORM, "pt") as stored:
            shapes = {name: stored.get_slice(name).get_shape() for name in stored.offset_keys()}
    except (OSError, SafetensorError):
        return False
    return all(shapes.get(name) == list(own.shape) for name, own in replica.named.items())


def _is_plain(model: nn.Module, replica: TrainedReplica) -> bool:
    """Whether PEFT's files have every bit of what is trained."""
    single = all(p.dtype == torch.float32 for p in replica.named.values())
    return model.dlora.config.method == "lora" and not replica.frozen and single  # type: ignore[union-attr]


def _load_training_form(replica: TrainedReplica, file: Path) -> None:
    try:
        with safe_open(file, "pt") as stored:
            metadata = stored.metadata() or {}
            record = json.loads(metadata.get("record", "null"))
            if record is not None:
                replica.method.load_record(int(metadata["step"]), record)
            names = {*replica.named, *replica.frozen}
            if names != set(stored.keys()):
                odd = sorted(names.symmetric_difference(stored.keys()))
                raise UsageError(f"{file}: does not fit this model's adapters, by {odd[0]}")
            with torch.no_grad():
                for name, own in {**replica.named, **replica.frozen}.items():
                    value = stored.get_tensor(name)
                    if value.shape != own.shape:
                        shapes = f"{list(value.shape)}, the model expects {list(own.shape)}"
                        raise UsageError(f"{file}: {name} has shape {shapes}")
                    own.copy_(value)
    except FileNotFoundError:
        raise UsageError(
            f"{file}: file not found, and PEFT's files lack the training form"
        ) from None
    except (SafetensorError, KeyError, ValueError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"{file}: damaged: {error}") from None
