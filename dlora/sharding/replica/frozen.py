"""Frozen tensors that are the same on every rank: one broadcast, and no replica afterwards."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from dlora.sharding.replica.flat_buffers import common_kind
from dlora.sharding.topology import Topology


@torch.no_grad()
def same_on_every_rank(named: Mapping[str, Tensor], topology: Topology) -> None:
    """Give every rank rank 0's values, in one broadcast; the tensors lie end to end afterwards.

    Args:
        named: in the same order on every rank.

    Raises:
        ReplicaError: they differ in dtype or device.
    """
    if topology.world == 1 or not named:
        return
    common_kind(named)
    flat = torch.cat([parameter.detach().view(-1) for parameter in named.values()])
    dist.broadcast(flat, src=0)
    parts = flat.split([parameter.numel() for parameter in named.values()])
    for parameter, part in zip(named.values(), parts, strict=True):
        parameter.data = part.view(parameter.shape)
