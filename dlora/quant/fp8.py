"""Fp8: eight bits a weight, a floating-point number of three mantissa bits, scaled by its row.

    scale   s = max |w| of a row / 448, float32     code   w / s as float8_e4m3fn, ties to even
    value   code · s                                 in float32, then rounded to the type asked for

8 + 32/n bits a weight, as int8. The error of a weight is relative: at most 2⁻⁴ |w|, and 2⁻¹⁰ s for
those below 2⁻⁶ s, where e4m3 has no exponents left; int8's is one of the row, max |w| / 254.
So fp8 is the better one for rows with outliers, and int8 for all others.

Source: Micikevicius et al. 2022, https://arxiv.org/abs/2209.05433, table 1 (E4M3).
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from dlora.quant.dequantize import chunk_rows, on_device
from dlora.quant.rows import ByteRows, as_bytes, from_bytes

_E4M3 = torch.float8_e4m3fn
_LARGEST = 448.0  # its largest number
_DIVISOR = torch.tensor(_LARGEST)


class Fp8(ByteRows):
    """The format `fp8`."""

    name: ClassVar[str] = "fp8"

    def codes(self, rows: Tensor) -> Tensor:
        """rows [k, n] of any float type → uint8 [k, n], the bytes of float8_e4m3fn."""
        steps = rows.float() / _steps(rows)
        # Division rounds, so that the largest may come out above 448, which e4m3fn has no code for.
        return steps.nan_to_num_(0.0).clamp_(-_LARGEST, _LARGEST).to(_E4M3).view(torch.uint8)

    def scales(self, rows: Tensor) -> Tensor:
        """rows [k, n] of any float type → uint8 [k, 4]."""
        return as_bytes(_steps(rows))

    def unpack(self, codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
        """codes [k, n], scales [k, 4] → [k, n] in `dtype`."""
        step = from_bytes(scales, torch.float32)
        if codes.device.type != "cpu":
            return times_step(codes, step, dtype)
        out = torch.empty(codes.shape, dtype=dtype)
        for rows in chunk_rows(codes):
            out[rows] = _as_floats(codes[rows]).mul_(step[rows])
        return out


def times_step(codes: Tensor, step: Tensor, dtype: torch.dtype) -> Tensor:
    """code · step in float32, rounded once to `dtype`, whatever the size in two kernels of a GPU.

    All of its numbers are numbers of `dtype`, and the product is taken in their place: no scratch.
    """
    numbers = codes.view(_E4M3).to(torch.float32 if dtype == torch.float64 else dtype)
    out = numbers if numbers.dtype == dtype else numbers.new_empty(numbers.shape, dtype=dtype)
    return torch.mul(numbers, step, out=out)


def _as_floats(codes: Tensor) -> Tensor:
    """The numbers of codes on a CPU, float32.

    torch converts e4m3 there one by one. Its bits are put at their places in a float16, whose
    exponents are 8 lower, and converted as such, which takes half of the time.
    """
    bits = codes.view(torch.int8).to(torch.int16).bitwise_left_shift_(8)
    halves = bits.bitwise_right_shift_(1).bitwise_and_(~0x4000)  # the shift has doubled the sign
    return halves.view(torch.float16).float().mul_(256)


def _steps(rows: Tensor) -> Tensor:
    """[k, n] → the scale of each row, float32 [k, 1]; zero of a row of zeros."""
    return rows.float().abs().amax(1, keepdim=True) / on_device(_DIVISOR, rows.device)
