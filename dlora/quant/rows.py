"""Numbers of a row as bytes, which every engine shards, gathers and stores unchanged."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor


class ByteRows:
    """Sizes of a format with a byte for each weight and a float32 for each row."""

    block: ClassVar[int] = 1

    def code_bytes(self, n: int) -> int:
        """Of a row of n weights."""
        return n

    def scale_bytes(self, n: int) -> int:
        """Of a row, whatever its length."""
        return 4


def as_bytes(numbers: Tensor) -> Tensor:
    """[k, q] of any type → uint8 [k, q · size of the type]."""
    return numbers.contiguous().view(torch.uint8)


def from_bytes(stored: Tensor, dtype: torch.dtype) -> Tensor:
    """uint8 [k, q · size of `dtype`] → [k, q]; a copy where the bytes are not aligned."""
    size = dtype.itemsize
    flat = stored.contiguous().view(-1)  # strides of a single row may be any
    if flat.storage_offset() % size:
        flat = flat.clone()
    return flat.view(dtype).view(len(stored), stored.shape[1] // size)
