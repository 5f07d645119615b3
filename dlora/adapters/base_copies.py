"""Tensors of the frozen base in PEFT's files: compared with the model's, and never loaded.

PEFT adds the weights of embeddings and heads: `….base_layer.weight` of adapted ones, `….weight` of
others (`save_embedding_layers`, and where the vocabulary was resized), and the buffers of modules
that are trained whole.
"""

from __future__ import annotations

from collections.abc import Collection, Container

import torch
from torch import Tensor, nn

from dlora.adapters.peft_names import PREFIX
from dlora.io.safetensors import FLOATS, INTEGERS, StoredTensor
from dlora.lora.attach import named_adapters
from dlora.quant.linear import is_packed


def base_names(model: nn.Module, keys: Container[str]) -> dict[str, str]:
    """{key of a copy in a file: the name of the base's own tensor}, of a model with adapters.

    Args:
        keys: of the file, without those of what is trained.
    """
    names = {
        f"{PREFIX}{path}.base_layer.weight": f"{path}.weight"
        for path, layer, _ in named_adapters(model)
        if not is_packed(layer)
    }
    every = (*model.named_parameters(remove_duplicate=False), *model.named_buffers())
    names |= {PREFIX + name: name for name, _ in every}
    return {key: name for key, name in names.items() if key in keys}


def take_base_copies(
    model: nn.Module, tensors: dict[str, StoredTensor], expected: Collection[str]
) -> dict[str, tuple[StoredTensor, Tensor]]:
    """Take the copies of frozen tensors out of `tensors`: (stored, the model's) by key.

    Args:
        expected: keys of what is trained.
    """
    if not tensors.keys() - set(expected):
        return {}
    own = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    named = base_names(model, {key for key in tensors if key not in expected})
    return {key: (tensors.pop(key), own[name].detach()) for key, name in named.items()}


def same_base(stored: StoredTensor, base: Tensor) -> bool:
    """Equal but for a cast; of a sharded weight only the shape is compared: no collective."""
    if stored.shape != tuple(base.shape) or stored.dtype not in FLOATS | INTEGERS.keys():
        return False
    if type(base) is not Tensor or base.device.type == "meta":
        return True
    copy = stored.rows().to(base.device)
    return torch.equal(copy.to(base.dtype), base) or torch.equal(base.to(copy.dtype), copy)
