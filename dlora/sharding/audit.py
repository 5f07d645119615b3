"""Whether tensors are the same on every rank: one checksum each, compared over all ranks."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from dlora.sharding.wire import WireCounter, ring_gather_bytes


def mismatch(named: Mapping[str, Tensor], world: int, wire: WireCounter) -> str:
    """The tensors that differ and the ranks that have other bits, or nothing; equal on all ranks.

    Collective: 8 bytes per rank unless something differs.
    """
    if world == 1:
        return ""
    sums = torch.stack([_checksum(tensor.detach()) for tensor in named.values()])
    total = _checksum(sums)[None]
    totals = total.new_empty(world)
    dist.all_gather_single(totals, total)
    wire.add(ring_gather_bytes(totals.nbytes, world))
    if bool((totals == totals[0]).all()):
        return ""
    every = sums.new_empty(world * len(sums))
    dist.all_gather_single(every, sums)
    return _describe(list(named), every.view(-1, len(sums)))


def _checksum(tensor: Tensor) -> Tensor:
    """int64 Σ bits_i · (2i + 1) mod 2^64: one changed word changes it, and so does a swap."""
    words = tensor.contiguous().view(-1).view(torch.int32).to(torch.int64)
    odd = torch.arange(words.numel(), device=words.device, dtype=torch.int64).mul_(2).add_(1)
    return (words * odd).sum()


def _describe(names: list[str], every: Tensor) -> str:
    """Name, for each tensor, the ranks that differ from the majority (rank 0 breaks a tie)."""
    found = []
    for index, name in enumerate(names):
        column = every[:, index].tolist()
        if len(set(column)) > 1:
            usual = max(column, key=lambda value: (column.count(value), value == column[0]))
            ranks = [str(rank) for rank, value in enumerate(column) if value != usual]
            found.append(f"{name} on rank {', '.join(ranks)}")
    return "; ".join(found[:5]) + (f"; and {len(found) - 5} more" if len(found) > 5 else "")
