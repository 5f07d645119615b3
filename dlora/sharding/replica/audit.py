"""Whether tensors are the same on every rank: one checksum each, compared over all ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from dlora.sharding.comm_bytes import WireCounter, ring_gather_bytes

SHOWN = 5
_BLOCK = 1 << 20  # words that are multiplied at a time: 16 bytes each beside the tensor


@dataclass(frozen=True)
class Difference:
    """A tensor that differs between ranks.

    Attributes:
        usual: a rank with the bits that most ranks have (rank 0's break a tie).
        others: the ranks that have other bits.
    """

    name: str
    usual: int
    others: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.name} on rank {', '.join(map(str, self.others))}"


def differences(named: Mapping[str, Tensor], world: int, wire: WireCounter) -> list[Difference]:
    """The tensors that differ between ranks; equal on all ranks.

    Collective: 8 bytes per rank unless something differs.
    """
    if world == 1:
        return []
    sums = torch.stack([_checksum(tensor.detach()) for tensor in named.values()])
    total = _checksum(sums)[None]
    totals = total.new_empty(world)
    dist.all_gather_single(totals, total)
    wire.add(ring_gather_bytes(totals.nbytes, world))
    if bool((totals == totals[0]).all()):
        return []
    every = sums.new_empty(world * len(sums))
    dist.all_gather_single(every, sums)
    return _found(list(named), every.view(-1, len(sums)))


def unhealed(
    named: Mapping[str, Tensor],
    world: int,
    wire: WireCounter,
    healed: Callable[[str], None] | None,
) -> str:
    """The tensors that differ and the ranks that have other bits, in a line; nothing if none do.

    Args:
        healed: called with that line once every rank has the usual bits; None leaves them as they
            are.
    """
    found = differences(named, world, wire)
    more = f"; and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    line = "; ".join(map(str, found[:SHOWN])) + more
    if not found or healed is None:
        return line
    with torch.no_grad():
        for difference in found:
            whole = named[difference.name].detach().clone()
            dist.broadcast(whole, src=difference.usual)
            named[difference.name].copy_(whole)
    healed(line)
    return ""


def _checksum(tensor: Tensor) -> Tensor:
    """int64 Σ bits_i · (2i + 1) mod 2^64: one changed word changes it, and so does a swap."""
    words = tensor.contiguous().view(-1).view(torch.int32)
    total = torch.zeros((), dtype=torch.int64, device=words.device)
    for first in range(0, words.numel(), _BLOCK):
        block = words[first : first + _BLOCK].to(torch.int64)
        odd = torch.arange(first, first + len(block), device=words.device).mul_(2).add_(1)
        total += block.mul_(odd).sum()
    return total


def _found(names: list[str], every: Tensor) -> list[Difference]:
    found = []
    for index, name in enumerate(names):
        column = every[:, index].tolist()
        if len(set(column)) > 1:
            usual = max(column, key=lambda value: (column.count(value), value == column[0]))
            others = tuple(rank for rank, value in enumerate(column) if value != usual)
            found.append(Difference(name, column.index(usual), others))
    return found
