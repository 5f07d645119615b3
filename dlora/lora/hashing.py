"""Hashes of integers, int32 in and out: lowbias32 with shifts that copy the sign.

The constants are those of https://github.com/skeeto/hash-prospector. torch has no arithmetic for
uint32: products of int32 wrap alike.
"""

from __future__ import annotations

import torch
from torch import Tensor

GAMMA, FIRST, SECOND = 0x9E3779B1 - 2**32, 0x7FEB352D, 0x846CA68B - 2**32


def mix(x: Tensor) -> Tensor:
    """lowbias32 of each element."""
    x = fold_(x ^ (x >> 16))
    return x ^ (x >> 16)


def fold_(x: Tensor) -> Tensor:
    """Most of `mix`, in place: enough where x is mixed already and only its high bits count."""
    x.mul_(FIRST)
    return x.bitwise_xor_(x >> 15).mul_(SECOND)


def counted(n: int, device: torch.device) -> Tensor:
    """[n]: 0, γ, 2γ, …"""
    return torch.arange(n, dtype=torch.int32, device=device).mul_(GAMMA)
