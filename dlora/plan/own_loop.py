"""`base: auto` for a loop of one's own, whose activations are unknown: they get half of memory."""

from __future__ import annotations

import torch
import torch.distributed as dist

from dlora.plan.capacity import free_bytes
from dlora.sharding.topology import Topology

W0_SHARE = 0.5  # of a rank's memory: for W0, A and B with their state; the loop has the rest
_STATE = 4  # A and B, their gradients, two moments


def cheapest_base(
    frozen: int, largest: int, trained: int, device: torch.device, topology: Topology
) -> str:
    """The cheapest of `none`, `node` and `world` that fits; the same on every rank. Collective.

    `none` sends no W0, `node` sends it inside nodes only.

    Args:
        frozen: bytes of W0, which is whole on every rank.
        largest: bytes of the largest part of it that is gathered at a time.
        trained: bytes of A and B.
        device: where they are.
    """
    free = free_bytes(device, topology.ranks_per_node)
    if topology.world == 1 or free is None:
        return "none"
    room = torch.tensor(int(W0_SHARE * (free + frozen)), device=device)
    dist.all_reduce(room, op=dist.ReduceOp.MIN)
    left = int(room) - _STATE * trained
    if frozen <= left:
        return "none"
    in_node = -(-frozen // topology.ranks_per_node) + 2 * largest
    several_nodes = topology.nodes > 1 and not topology.uneven
    return "node" if several_nodes and in_node <= left else "world"
