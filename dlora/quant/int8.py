"""Int8: eight bits a weight, a multiple of its row's step.

    scale   c = max |w| of a row, float32           code   round(127 · w / c), −127 … 127
    value   code · c / 127                          in float32, then rounded to the type asked for

8 + 32/n bits a weight. Rows are independent of one another. The codes are those of bitsandbytes'
`int8_vectorwise_quant`.

Source: Dettmers et al. 2022, https://arxiv.org/abs/2208.07339, section 2.1.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from dlora.quant.dequantize import chunk_rows, on_device
from dlora.quant.rows import ByteRows, as_bytes, from_bytes
from dlora.quant.where_triton import in_triton

_LARGEST = torch.tensor(127.0)


class Int8(ByteRows):
    """The format `int8`."""

    name: ClassVar[str] = "int8"

    def codes(self, rows: Tensor) -> Tensor:
        """rows [k, n] of any float type → uint8 [k, n], the bytes of signed integers."""
        largest = rows.float().abs().amax(1, keepdim=True)
        steps = rows.float() * (127 / largest).nan_to_num_(posinf=0.0)
        return as_bytes(steps.round_().to(torch.int8))

    def scales(self, rows: Tensor) -> Tensor:
        """rows [k, n] of any float type → uint8 [k, 4]."""
        return as_bytes(rows.float().abs().amax(1, keepdim=True))

    def unpack(self, codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
        """codes [k, n], scales [k, 4] → [k, n] in `dtype`."""
        if in_triton(codes, scales):
            from dlora.quant import triton_unpack

            return triton_unpack.int8(codes, scales, dtype)
        step = from_bytes(scales, torch.float32) / on_device(_LARGEST, codes.device)
        out = torch.empty(codes.shape, dtype=dtype, device=codes.device)
        if codes.device.type != "cpu":
            return times_step(codes, step, out)
        for rows in chunk_rows(codes):
            out[rows] = codes[rows].view(torch.int8).float().mul_(step[rows])
        return out


def times_step(codes: Tensor, step: Tensor, out: Tensor) -> Tensor:
    """code · step in float32, rounded once to the type of `out`.

    On a GPU it is one kernel, which casts as it reads and writes. On a CPU it would cast whole
    tensors first.
    """
    return torch.mul(codes.view(torch.int8), step, out=out)
