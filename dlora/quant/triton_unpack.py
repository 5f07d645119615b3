"""Unpacks nf4 and int8 in one kernel each; imported where `in_triton` says that it is used.

    nf4      out = round(level · c)            c in bfloat16
    nf4-dq   out = round(level · (q / 255 · c_row))
    int8     out = round(code · (c_row / 127))

Every operation in float32 and in this order, so that the bits are those of torch's operators in
`nf4.py` and `int8.py`. A program unpacks a part of a row.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dlora.quant.rows import from_bytes

_WIDEST = 1024  # bytes of codes that a program reads


def nf4(codes: Tensor, scales: Tensor, levels: Tensor, double: bool, dtype: torch.dtype) -> Tensor:
    """codes uint8 [k, n/2], scales uint8 [k, bytes] → [k, n] in `dtype`.

    Args:
        levels: float32 [16], on the device of the codes.
        double: scales are in 8 bits, behind them the largest of the row in float32.
    """
    k, half = codes.shape
    out = torch.empty(k, 2 * half, dtype=dtype, device=codes.device)
    stored = scales.contiguous() if double else from_bytes(scales, torch.bfloat16)
    _start(_nf4, out, half, codes.contiguous(), stored, levels, DOUBLE=double)
    return out


def int8(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """codes uint8 [k, n], the bytes of signed integers, scales uint8 [k, 4] → [k, n] in `dtype`."""
    out = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    signed, largest = codes.contiguous().view(torch.int8), from_bytes(scales, torch.float32)
    _start(_int8, out, codes.shape[1], signed, largest)
    return out


def _start(kernel: Any, out: Tensor, width: int, *tensors: Tensor, **constants: Any) -> None:
    """One program for each part of each row of `width` bytes."""
    block = min(_WIDEST, triton.next_power_of_2(max(width, 1)))
    parts = triton.cdiv(width, block)
    if out.numel():
        with torch.cuda.device_of(out):
            kernel[(len(out) * parts,)](out, *tensors, width, parts, BLOCK=block, **constants)


@triton.jit
def _nf4(out, codes, scales, levels, half, parts, DOUBLE: tl.constexpr, BLOCK: tl.constexpr):
    row = (tl.program_id(0) // parts).to(tl.int64)
    first = tl.program_id(0) % parts * BLOCK
    byte = first + tl.arange(0, BLOCK)
    both = tl.load(codes + row * half + byte, byte < half, other=0).to(tl.int32)
    blocks, block = half // 32, byte // 32
    if DOUBLE:
        here = scales + row * (blocks + 4)
        bits = tl.load(here + blocks).to(tl.uint32)
        bits |= tl.load(here + blocks + 1).to(tl.uint32) << 8
        bits |= tl.load(here + blocks + 2).to(tl.uint32) << 16
        bits |= tl.load(here + blocks + 3).to(tl.uint32) << 24
        steps = tl.load(here + block, byte < half, other=0).to(tl.float32)
        scale = tl.div_rn(steps, tl.full([BLOCK], 255, tl.float32)) * bits.to(
            tl.float32, bitcast=True
        )
    else:
        scale = tl.load(scales + row * blocks + block, byte < half, other=0).to(tl.float32)
    high, low = tl.load(levels + (both >> 4)) * scale, tl.load(levels + (both & 15)) * scale
    column = 2 * first + tl.arange(0, 2 * BLOCK)
    values = tl.interleave(high, low).to(out.dtype.element_ty)
    tl.store(out + row * (2 * half) + column, values, column < 2 * half)


@triton.jit
def _int8(out, codes, scales, n, parts, BLOCK: tl.constexpr):
    row = (tl.program_id(0) // parts).to(tl.int64)
    column = tl.program_id(0) % parts * BLOCK + tl.arange(0, BLOCK)
    code = tl.load(codes + row * n + column, column < n, other=0).to(tl.float32)
    step = tl.div_rn(tl.load(scales + row), 127.0)
    tl.store(out + row * n + column, (code * step).to(out.dtype.element_ty), column < n)
