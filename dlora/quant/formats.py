"""The formats of packed weights by name, and unpacking as one operator of torch.

A format is one file of this folder, a class with the members of `Format`, which `dlora.registry`
finds by its `name`.
"""

from __future__ import annotations

from typing import ClassVar, Protocol

import torch
from torch import Tensor

from dlora.registry import Parts


class Format(Protocol):
    """How rows of a weight are packed. Rows never depend on one another."""

    name: ClassVar[str]  # the value of `model.quantization`
    block: ClassVar[int]  # weights of a row that share a scale; a row must divide by it

    def code_bytes(self, n: int) -> int:
        """Bytes of the codes of a row of n weights."""

    def scale_bytes(self, n: int) -> int:
        """Bytes of the scales of a row of n weights."""

    def codes(self, rows: Tensor) -> Tensor:
        """rows [k, n] of any float type → uint8 [k, code_bytes(n)]."""

    def scales(self, rows: Tensor) -> Tensor:
        """rows [k, n] of any float type → uint8 [k, scale_bytes(n)]."""

    def unpack(self, codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
        """The weights of the rows, [k, n]: computed in float32, then rounded to `dtype`."""


FORMATS: Parts[Format] = Parts("quant", make=lambda cls: cls())


@torch.library.custom_op("dlora::unpack", mutates_args=())
def unpack(codes: Tensor, scales: Tensor, n: int, name: str, dtype: torch.dtype) -> Tensor:
    """[k, n] of the format `name`; an operator, so that tracing does not look inside."""
    return FORMATS[name].unpack(codes, scales, dtype)


@unpack.register_fake
def _(codes: Tensor, scales: Tensor, n: int, name: str, dtype: torch.dtype) -> Tensor:
    return codes.new_empty((codes.shape[0], n), dtype=dtype)


@torch.library.custom_op("dlora::unpack_after", mutates_args=())
def unpack_after(
    codes: Tensor, scales: Tensor, n: int, name: str, dtype: torch.dtype, first: Tensor
) -> Tensor:
    """`unpack`, not before there is `first`.

    In a compiled graph of forward and backward two equal operators become one, whose result is
    stored in between. With the gradient as `first` it is another one, and belongs to backward.
    """
    return FORMATS[name].unpack(codes, scales, dtype)


@unpack_after.register_fake
def _(
    codes: Tensor, scales: Tensor, n: int, name: str, dtype: torch.dtype, first: Tensor
) -> Tensor:
    return codes.new_empty((codes.shape[0], n), dtype=dtype)
