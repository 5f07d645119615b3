"""Whole tensors of an optimizer's state from what several ranks store of it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from dlora.sharding.replica.flat_shards import RankRange
from dlora.sharding.replica.optimizer_state import States
from dlora.sharding.topology import Topology


class StateKind(NamedTuple):
    """One rank's description of a state tensor.

    Attributes:
        dtype: its name, without "torch.".
        shape: of what the rank stores.
        value: of a tensor without dims, such as a count of steps, which is sent in no other way.
    """

    dtype: str
    shape: list[int]
    value: float | None

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)


Kinds = dict[str, dict[str, StateKind]]  # name → slot → description


def kinds_by_rank(states: States, topology: Topology, device: torch.device) -> list[Kinds]:
    """Every rank's description of its states. Collective."""
    mine = {
        name: {
            slot: (
                str(state.dtype).removeprefix("torch."),
                list(state.shape),
                None if state.ndim else state.item(),
            )
            for slot, state in slots.items()
        }
        for name, slots in states.items()
    }
    return [
        {
            name: {slot: StateKind(*kind) for slot, kind in slots.items()}
            for name, slots in json.loads(text).items()
        }
        for text in _texts(json.dumps(mine), topology, device)
    ]


def gather_ranges(
    mine: Tensor | None,
    ranges: Sequence[RankRange],
    like: Tensor,
    topology: Topology,
    *,
    everywhere: bool,
) -> Tensor:
    """A whole flat tensor, [numel], from its ranges. Collective among the ranks that store or get.

    Unless it is wanted `everywhere`, rank 0 alone gets it, and the others get an empty tensor:
    each sends what it stores and allocates nothing.

    Args:
        mine: this rank's range, flat; None where it has none.
        like: an empty tensor of its dtype, on the device where it is wanted.
    """
    rank = topology.rank
    if rank != 0 and not everywhere:
        if mine is not None:
            _wait_for([dist.P2POp(dist.isend, mine, 0)])
        return like
    whole = like.new_empty(ranges[-1].stop if ranges else 0)
    pieces = {range_.rank: whole[range_.start : range_.stop] for range_ in ranges}
    if mine is not None:
        pieces[rank].copy_(mine)
    if not everywhere:
        _wait_for([dist.P2POp(dist.irecv, piece, src) for src, piece in pieces.items() if src])
    elif topology.world > 1:
        for source, piece in pieces.items():
            dist.broadcast(piece, src=source)
    return whole


def _wait_for(operations: list[dist.P2POp]) -> None:
    """Start them together, and wait for all."""
    if operations:
        for work in dist.batch_isend_irecv(operations):
            work.wait()


def _texts(text: str, topology: Topology, device: torch.device) -> list[str]:
    """Every rank's text, by rank."""
    if topology.world == 1:
        return [text]
    content = text.encode()
    lengths = torch.zeros(topology.world, dtype=torch.int64, device=device)
    dist.all_gather_single(lengths, torch.tensor([len(content)], device=device))
    longest = int(lengths.max())
    mine = torch.frombuffer(bytearray(content.ljust(longest)), dtype=torch.uint8).to(device)
    every = mine.new_empty(topology.world * longest)
    dist.all_gather_single(every, mine)
    return [bytes(row.tolist()).decode() for row in every.view(topology.world, longest)]
