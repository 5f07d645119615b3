"""A mask of dropout, made from hashes wherever it is used and never stored: see `dropout.py`.

Where Triton computes (`in_triton`), making and applying it is one kernel, of the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dlora.lora.hashing import counted, fold_, mix
from dlora.quant.where_triton import in_triton

# Elements hashed at one time: as many as a core's cache has room for, and few operations on a GPU.
_AT_ONCE = {"cpu": 1 << 16}
_AT_ONCE_ELSEWHERE = 1 << 24


@dataclass(frozen=True)
class Mask:
    """The mask of an input [T, n], made wherever it is used.

    Attributes:
        tokens: int32 [T], a hash of each token.
        layer: the key of the layer, a number or an int32 scalar.
        p: the share of elements that are dropped.
    """

    tokens: Tensor
    layer: int | Tensor
    p: float

    def keep(self, n: int) -> Tensor:
        """bool [T, n], False where an element is dropped."""
        if torch.compiler.is_compiling():
            return self._whole(n)
        if in_triton(self.tokens):
            from dlora.lora import triton_dropout

            return triton_dropout.keep(*self._keys(), n)
        keep = torch.empty(len(self.tokens), n, dtype=torch.bool, device=self.tokens.device)
        for rows, part in self._parts(n):
            keep[rows] = part
        return keep

    @property
    def scale(self) -> float:
        """What is kept is multiplied by: 1/(1 − p)."""
        return 1 / (1 - self.p)

    def drop(self, x_Tn: Tensor, keep: Tensor | None = None) -> Tensor:
        """scale · keep⊙x, a new tensor.

        Args:
            keep: the mask, where it has been made already.
        """
        if torch.compiler.is_compiling():
            return x_Tn * (self._whole(x_Tn.shape[1]) if keep is None else keep) * self.scale
        found_Tn = self.in_one_kernel(x_Tn, 1)
        if found_Tn is not None:
            return found_Tn
        if keep is not None:
            return (x_Tn * keep).mul_(self.scale)
        out_Tn = torch.empty_like(x_Tn)
        for rows, part in self._parts(x_Tn.shape[1]):
            torch.mul(x_Tn[rows], part, out=out_Tn[rows]).mul_(self.scale)
        return out_Tn

    def in_one_kernel(self, x: Tensor, dim: int) -> Tensor | None:
        """scale · keep⊙x with columns along `dim`, where Triton computes."""
        if x.dtype == torch.float64 or not in_triton(x, self.tokens):
            return None
        from dlora.lora import triton_dropout

        return triton_dropout.drop(*self._keys(), x, dim, self.scale)

    def _keys(self) -> tuple[Tensor, int, int]:
        """(int32 [T] and a number to be mixed, the least hash of what is kept)."""
        if isinstance(self.layer, int):
            return self.tokens, self.layer, self._threshold
        return self.tokens ^ self.layer, 0, self._threshold

    def _parts(self, n: int) -> Iterator[tuple[slice, Tensor]]:
        """(some rows, their part of the mask)."""
        tokens_T1, columns_n = self._hashes(n)
        limit = _AT_ONCE.get(self.tokens.device.type, _AT_ONCE_ELSEWHERE)
        step = max(1, limit // max(n, 1))
        for first in range(0, len(tokens_T1), step):
            rows = slice(first, first + step)
            yield rows, fold_(tokens_T1[rows] ^ columns_n) >= self._threshold

    def _whole(self, n: int) -> Tensor:
        """The mask by an operator that torch's compiler does not look into: the same bits."""
        layer = self.layer
        if isinstance(layer, int):
            layer = torch.full((), layer, dtype=torch.int32, device=self.tokens.device)
        return _kept(self.tokens, layer, n, self.p)

    def _hashes(self, n: int) -> tuple[Tensor, Tensor]:
        """int32 [T, 1] and [n]."""
        columns_n = mix(counted(n, self.tokens.device))
        return mix(self.tokens ^ self.layer)[:, None], columns_n

    @property
    def _threshold(self) -> int:
        return min(round(self.p * 2**32), 2**32 - 1) - 2**31


@torch.library.custom_op("dlora::kept", mutates_args=())
def _kept(tokens: Tensor, layer: Tensor, n: int, p: float) -> Tensor:
    return Mask(tokens, layer, p).keep(n)


@_kept.register_fake
def _(tokens: Tensor, layer: Tensor, n: int, p: float) -> Tensor:
    return tokens.new_empty((tokens.shape[0], n), dtype=torch.bool)


class _Dropped(torch.autograd.Function):
    """scale · keep⊙x with columns along `dim`; backward makes the mask again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Mask, dim: int) -> Tensor:
        ctx.mask, ctx.dim = mask, dim
        found = mask.in_one_kernel(x, dim)
        if found is not None:
            return found
        shape = x.movedim(dim, -1).shape
        keep = mask.keep(shape[-1]).view(shape).movedim(-1, dim)
        return (x * keep).mul_(mask.scale)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _Dropped.apply(grads[0], ctx.mask, ctx.dim), None, None


def dropped(x: Tensor, mask: Mask | None, dim: int) -> Tensor:
    """x with a mask applied whose columns lie along `dim`, for autograd to differentiate."""
    return x if mask is None else _Dropped.apply(x, mask, dim)
