"""De-quantises 4-bit codes: levels times the scales of their blocks.

Where bitsandbytes is installed, its kernel does it; where Triton is, on a GPU, that of
`triton_unpack.py`. Otherwise torch looks up the two levels of each byte, a chunk of rows at a time,
so that intermediate values fit the cache. The results are the same.
"""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

# Of codes. Each byte takes 12 of scratch in torch: 50 MB on a GPU, whose kernels for so many take
# longer than their launch.
_CHUNK_BYTES = {"cpu": 1 << 18}
_CHUNK_ELSEWHERE = 1 << 22
_BY_BITSANDBYTES = (torch.bfloat16, torch.float16, torch.float32)
_on_device: dict[tuple[int, torch.device], Tensor] = {}


def levels_times_scales(
    codes: Tensor, scales: Tensor, pairs: Tensor, block: int, dtype: torch.dtype
) -> Tensor:
    """NF4 codes uint8 [k, n/2], scales float32 [k, n/block] → [k, n] in `dtype`.

    Args:
        pairs: float32 [256, 2], the two levels of each byte, beside the codes.
    """
    fast = bitsandbytes_kernel() if dtype in _BY_BITSANDBYTES else None
    if fast is None:
        return levels_in_torch(codes, scales, pairs, block, dtype)
    shape = [codes.shape[0], 2 * codes.shape[1]]
    return fast(codes.contiguous(), scales.reshape(-1), block, "nf4", shape, dtype)


def levels_in_torch(
    codes: Tensor, scales: Tensor, pairs: Tensor, block: int, dtype: torch.dtype
) -> Tensor:
    """`levels_times_scales` without bitsandbytes."""
    k, half = codes.shape
    out = torch.empty(k, 2 * half, dtype=dtype, device=codes.device)
    both = pairs.view(torch.int64).view(-1)  # two floats in one look-up

    def values(rows: slice) -> Tensor:
        found = torch.index_select(both, 0, codes[rows].reshape(-1).int())
        blocks = found.view(torch.float32).view(-1, block)
        return blocks.mul_(scales[rows].reshape(-1, 1)).view(-1, 2 * half)

    for rows in chunk_rows(codes):
        out[rows] = values(rows)  # which is gone before the next chunk
    return out


def on_device(constant: Tensor, device: torch.device) -> Tensor:
    """A tensor of a module on a device, to which it is copied once: a copy is a wait for a GPU.

    Divisors as well: by a number of Python a GPU does not divide, but multiplies with its rounded
    reciprocal, so that the bits would not be those of a CPU.
    """
    if device.type == "cpu":
        return constant
    key = id(constant), device
    if key not in _on_device:
        _on_device[key] = constant.to(device)
    return _on_device[key]


def chunk_rows(codes: Tensor) -> Iterator[slice]:
    """Slices of consecutive rows that fit the cache together."""
    limit = _CHUNK_BYTES.get(codes.device.type, _CHUNK_ELSEWHERE)
    step = max(1, limit // max(codes.shape[1], 1))
    for first in range(0, len(codes), step):
        yield slice(first, first + step)


@functools.cache
def bitsandbytes_kernel() -> Any:
    """bitsandbytes' operator, or None where it is not installed. The first call imports it.

    On some CPUs its import would download and run a kernel from a hub, for an operator that is not
    used here. The library that downloads it is hidden meanwhile.
    """
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with _missing("kernels"):
            import bitsandbytes  # noqa: F401 - registers its operators
    except ImportError:
        return None
    finally:
        logger.setLevel(level)
    return torch.ops.bitsandbytes.dequantize_4bit


@contextmanager
def _missing(module: str) -> Iterator[None]:
    """Inside, an import of `module` fails."""
    modules: dict[str, Any] = sys.modules
    absent = object()
    before, modules[module] = modules.get(module, absent), None
    try:
        yield
    finally:
        del modules[module]
        if before is not absent:
            modules[module] = before
