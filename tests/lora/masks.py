"""Dropout masks as tensors, for what is compared with them."""

import torch
from torch import Tensor

from dlora.lora.dropout import DropoutStream, key_of


def keep_mask(stream: DropoutStream, x: Tensor, p: float, layer: str) -> Tensor:
    """bool, shaped like x; False where an element is dropped."""
    mask = stream.mask(x, p, key_of(layer))
    if mask is None:
        return torch.ones(x.shape, dtype=torch.bool)
    return mask.keep(x.shape[-1]).view(x.shape)
