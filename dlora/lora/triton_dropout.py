"""Dropout's masks in one kernel; imported where `in_triton` says that it is used.

An element is hashed as in `dropout.py`, and multiplied in float32: x·keep·scale is rounded once, as
torch does it. A program has a tile of some tokens and some columns.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dlora.lora import hashing

_GAMMA, _FIRST = tl.constexpr(hashing.GAMMA), tl.constexpr(hashing.FIRST)
_SECOND = tl.constexpr(hashing.SECOND)
_WIDEST, _TILE = 512, 2048  # columns, and elements, of a tile


def keep(tokens: Tensor, layer: int, threshold: int, n: int) -> Tensor:
    """bool [T, n]: fold(mix(t ⊕ layer) ⊕ c) ≥ threshold, for tokens int32 [T]."""
    out = torch.empty(len(tokens), n, dtype=torch.bool, device=tokens.device)
    _start(_keep, out.view(torch.int8), n, tokens, layer, threshold)
    return out


def drop(tokens: Tensor, layer: int, threshold: int, x: Tensor, dim: int, scale: float) -> Tensor:
    """scale · keep⊙x for x of any strides but float64, columns along `dim`, tokens along others."""
    dim %= x.ndim
    n = x.shape[dim]
    x_ocp = x.reshape(math.prod(x.shape[:dim]), n, math.prod(x.shape[dim + 1 :]))
    out = torch.empty_like(x_ocp)
    strides = (*x_ocp.stride(), *out.stride())
    _start(_drop, out, n, tokens, layer, threshold, x_ocp, x_ocp.shape[2], scale, *strides)
    return out.view(x.shape)


def _start(kernel: Any, out: Tensor, n: int, tokens: Tensor, *arguments: Any) -> None:
    if not out.numel():
        return
    width = min(_WIDEST, triton.next_power_of_2(n))
    height, T = _TILE // width, len(tokens)
    columns = triton.cdiv(n, width)
    with torch.cuda.device_of(out):
        kernel[(triton.cdiv(T, height) * columns,)](
            out, tokens.contiguous(), T, n, columns, *arguments, HEIGHT=height, WIDTH=width
        )


@triton.jit
def _fold(x):
    x *= _FIRST
    return (x ^ (x >> 15)) * _SECOND


@triton.jit
def _mix(x):
    x = _fold(x ^ (x >> 16))
    return x ^ (x >> 16)


@triton.jit
def _tile(tokens, T, n, columns, layer, threshold, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    """Tokens [HEIGHT, 1] and columns [1, WIDTH] in int64, which of them there are, and are kept."""
    token = (tl.program_id(0) // columns).to(tl.int64) * HEIGHT + tl.arange(0, HEIGHT)[:, None]
    column = tl.program_id(0) % columns * WIDTH + tl.arange(0, WIDTH)[None, :]
    hashed = _mix(tl.load(tokens + token, token < T, other=0) ^ layer)
    kept = _fold(hashed ^ _mix(column * _GAMMA)) >= threshold
    return token, column.to(tl.int64), (token < T) & (column < n), kept


@triton.jit(do_not_specialize=["layer", "threshold"])
def _keep(out, tokens, T, n, columns, layer, threshold, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    token, column, inside, kept = _tile(tokens, T, n, columns, layer, threshold, HEIGHT, WIDTH)
    tl.store(out + token * n + column, kept.to(tl.int8), inside)


@triton.jit(do_not_specialize=["layer", "threshold"])
def _drop(
    out,
    tokens,
    T,
    n,
    columns,
    layer,
    threshold,
    x,
    places,
    scale,
    x_outer,
    x_column,
    x_place,
    out_outer,
    out_column,
    out_place,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
):
    token, column, inside, kept = _tile(tokens, T, n, columns, layer, threshold, HEIGHT, WIDTH)
    outer, place = token // places, token % places
    found = tl.load(x + outer * x_outer + place * x_place + column * x_column, inside, other=0)
    value = found.to(tl.float32) * kept.to(tl.float32) * scale
    to = out + outer * out_outer + place * out_place + column * out_column
    tl.store(to, value.to(out.dtype.element_ty), inside)
