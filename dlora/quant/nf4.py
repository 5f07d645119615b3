"""NF4: four bits a weight, each the nearest of 16 levels on the scale of its block.

    a row of W0    w_0 … w_63 │ w_64 … w_127 │ …      blocks never cross the end of a row
    scale          c = max |w| of a block
    code           argmin_i |w / c − level_i|          two in a byte, the first in the high half
    value          level_i · c                         in float32, then rounded to the type wanted

    nf4      c in bfloat16                             4 + 16/64 bits a weight: 4.25
    nf4-dq   c in 8 bits, of the largest c of its row  4 +  8/64 + 32/n: 4.14 in a row of 2048

The levels are quantiles of a normal distribution that are as likely as one another. Everything that
belongs to a weight is in its row, so rows can be packed one by one.

Source: Dettmers et al. 2023, https://arxiv.org/abs/2305.14314, section 3 and appendix E.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from dlora.quant.dequantize import bitsandbytes_kernel, levels_times_scales, on_device
from dlora.quant.rows import as_bytes, from_bytes
from dlora.quant.where_triton import in_triton

LEVELS = torch.tensor(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ]
)
_MIDDLES = (LEVELS[1:] + LEVELS[:-1]) / 2
_PAIRS = torch.stack([LEVELS.repeat_interleave(16), LEVELS.repeat(16)], dim=1)  # by byte
_STEPS = torch.tensor(255.0)


class Nf4:
    """The format `nf4`: scales in bfloat16."""

    name: ClassVar[str] = "nf4"
    block: ClassVar[int] = 64
    double: ClassVar[bool] = False

    def code_bytes(self, n: int) -> int:
        """Of a row of n weights."""
        return n // 2

    def scale_bytes(self, n: int) -> int:
        """Of a row of n weights."""
        return n // self.block + 4 if self.double else n // self.block * 2

    def codes(self, rows: Tensor) -> Tensor:
        """rows [k, n] of any float type → uint8 [k, n/2]."""
        blocks = rows.float().reshape(-1, self.block)
        # Times the reciprocal and not divided, as bitsandbytes does it; a block of zeros stays one.
        inverse = blocks.abs().amax(1, keepdim=True).reciprocal_().nan_to_num_(posinf=0.0)
        middles = _MIDDLES.to(rows.device)
        index = torch.bucketize(blocks * inverse, middles, out_int32=True).to(torch.uint8)
        high, low = index.view(len(rows), -1, 2).unbind(2)
        return (high << 4) | low

    def scales(self, rows: Tensor) -> Tensor:
        """rows [k, n] of any float type → uint8 [k, scale_bytes(n)]."""
        largest = rows.float().unflatten(1, (-1, self.block)).abs().amax(2)
        if not self.double:
            return as_bytes(largest.bfloat16())
        of_row = largest.amax(1, keepdim=True)
        steps = largest * (255 / of_row).nan_to_num_(posinf=0.0)
        return torch.cat([steps.round_().to(torch.uint8), as_bytes(of_row)], dim=1)

    def unpack(self, codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
        """codes [k, n/2], scales [k, scale_bytes(n)] → [k, n] in `dtype`."""
        device = codes.device
        if in_triton(codes, scales) and bitsandbytes_kernel() is None:
            from dlora.quant import triton_unpack

            return triton_unpack.nf4(codes, scales, on_device(LEVELS, device), self.double, dtype)
        if self.double:
            steps, of_row = scales[:, :-4].float(), from_bytes(scales[:, -4:], torch.float32)
            blocks = steps / on_device(_STEPS, device) * of_row
        else:
            blocks = from_bytes(scales, torch.bfloat16).float()
        return levels_times_scales(codes, blocks, on_device(_PAIRS, device), self.block, dtype)


class Nf4Dq(Nf4):
    """The format `nf4-dq`: scales in 8 bits."""

    name = "nf4-dq"
    double = True
