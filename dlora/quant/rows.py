"""Numbers of a row as bytes, which every engine shards, gathers and stores unchanged."""

from __future__ import annotations

import torch
from torch import Tensor


def as_bytes(numbers: Tensor) -> Tensor:
    """[k, q] of any type → uint8 [k, q · size of the type]."""
    return numbers.contiguous().view(torch.uint8)


def from_bytes(stored: Tensor, dtype: torch.dtype) -> Tensor:
    """uint8 [k, q · size of `dtype`] → [k, q]; a copy where the bytes are not aligned."""
    size = dtype.itemsize
    if not stored.is_contiguous():
        stored = stored.contiguous()
    elif stored.storage_offset() % size:
        stored = stored.clone()
    return stored.view(dtype)
