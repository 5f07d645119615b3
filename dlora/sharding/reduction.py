"""One sum of one flat tensor over all ranks, in the shape of the machine.

On one node it is an all-reduce. Over several nodes of G ranks it is a reduce-scatter inside the
node, an all-reduce of 1/G across nodes between ranks of equal place, and an all-gather inside the
node: each link between nodes then carries 1/G of the tensor per rank, and every rank gets the same
bits.
"""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from dlora.sharding.mesh import Topology
from dlora.sharding.wire import WireCounter, ring_gather_bytes, ring_reduce_bytes


def is_hierarchical(topology: Topology) -> bool:
    """Whether there is a level inside nodes and one between them."""
    return topology.nodes > 1 and topology.ranks_per_node > 1 and not topology.uneven


def padded(numel: int, topology: Topology) -> int:
    """`numel`, rounded up so that it divides over the ranks of a node."""
    return numel + (-numel % topology.ranks_per_node if is_hierarchical(topology) else 0)


def reduction_bytes(nbytes: int, topology: Topology) -> float:
    """Ring-equivalent bytes that a rank sends in one reduction of a tensor of `nbytes`."""
    if not is_hierarchical(topology):
        return ring_reduce_bytes(nbytes, topology.world)
    inside = 2 * ring_gather_bytes(nbytes, topology.ranks_per_node)
    return inside + ring_reduce_bytes(nbytes / topology.ranks_per_node, topology.nodes)


class Reduction:
    """The process groups of the reduction; every rank must construct it."""

    def __init__(self, topology: Topology, wire: WireCounter) -> None:
        self.topology, self.wire = topology, wire
        if is_hierarchical(topology):
            nodes, local = topology.nodes, topology.ranks_per_node
            inside = [[n * local + i for i in range(local)] for n in range(nodes)]
            across = [[n * local + i for n in range(nodes)] for i in range(local)]
            self._inside, _ = dist.new_subgroups_by_enumeration(inside)
            self._across, _ = dist.new_subgroups_by_enumeration(across)

    def sum_(self, flat: Tensor) -> None:
        """flat ← Σ over ranks, in place; its length is `padded`."""
        topology = self.topology
        if topology.world == 1:
            return
        self.wire.add(reduction_bytes(flat.nbytes, topology))
        if not is_hierarchical(topology):
            dist.all_reduce(flat)
            return
        part = flat.new_empty(flat.numel() // topology.ranks_per_node)
        dist.reduce_scatter_single(part, flat, group=self._inside)
        dist.all_reduce(part, group=self._across)
        dist.all_gather_single(flat, part, group=self._inside)
