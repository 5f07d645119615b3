"""One sum of one flat tensor over all ranks, in the shape of the machine.

On one node it is an all-reduce. Over several nodes of G ranks it is a reduce-scatter inside the
node, an all-reduce of 1/G across nodes between ranks of equal index, and an all-gather inside the
node: each link between nodes then carries 1/G of the tensor per rank, and every rank gets the same
bits.

The same in two halves, for the same bytes: `scatter_` leaves each rank with one part of the sum
(reduce-scatter inside the node, then across nodes), `gather_` makes a tensor whole of such parts
(all-gather across nodes, then inside).

Gradients may be sent in fewer bits (`sharding.reduce_dtype`). Then each half sends rounded numbers,
and every sum is made in the tensor's own dtype, in the order of ranks:

    g_i ──round──> owner of the part: Σ_i g_i in float32 ──round──> every rank

|sum − Σ g| ≤ u · (Σ |g_i| + |Σ g_i|) to first order, u = 2⁻⁸ for bfloat16, and one u · Σ |g_i| more
on several nodes, where sums of nodes are rounded too.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from dlora.sharding.comm_bytes import WireCounter, ring_gather_bytes, ring_reduce_bytes
from dlora.sharding.topology import Topology


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


def divisible(numel: int, topology: Topology) -> int:
    """`numel`, rounded up so that it divides into one part for each rank."""
    return numel + -numel % topology.world


def rounded_bytes(numel: int, itemsize: int, topology: Topology) -> float:
    """`reduction_bytes` of `numel` gradients that are sent as numbers of `itemsize` bytes."""
    return reduction_bytes(divisible(numel, topology) * itemsize, topology)


def owner(part: int, topology: Topology) -> int:
    """The rank to which `scatter_` brings the part of this number."""
    if not is_hierarchical(topology):
        return part
    index, node = divmod(part, topology.nodes)
    return node * topology.ranks_per_node + index


def part_of(rank: int, topology: Topology) -> int:
    """The number of the part that `scatter_` brings to a rank."""
    if not is_hierarchical(topology):
        return rank
    node, index = divmod(rank, topology.ranks_per_node)
    return index * topology.nodes + node


class Reduction:
    """The process groups of the reduction; every rank must construct it.

    Args:
        sent_as: the dtype in which gradients are sent; None: their own.
    """

    def __init__(
        self, topology: Topology, wire: WireCounter, sent_as: torch.dtype | None = None
    ) -> None:
        self.topology, self.wire, self.sent_as = topology, wire, sent_as
        if is_hierarchical(topology):
            nodes, local = topology.nodes, topology.ranks_per_node
            inside = [[n * local + i for i in range(local)] for n in range(nodes)]
            across = [[n * local + i for n in range(nodes)] for i in range(local)]
            self._inside, _ = dist.new_subgroups_by_enumeration(inside)
            self._across, _ = dist.new_subgroups_by_enumeration(across)
            index = topology.rank % local
            self._levels = [(self._inside, local, index), (self._across, nodes, topology.node)]
        elif topology.world > 1:
            self._levels = [(None, topology.world, topology.rank)]
        else:
            self._levels = []

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

    def sum_of(self, flat: Tensor) -> Tensor:
        """Σ over ranks of flat tensors of any length."""
        whole = flat.new_zeros(padded(flat.numel(), self.topology))
        whole[: flat.numel()] = flat
        self.sum_(whole)
        return whole[: flat.numel()]

    def scatter_(self, flat: Tensor) -> None:
        """Part `part_of(rank)` of flat ← Σ over ranks; the other parts are overwritten.

        Its length is `divisible`; so is that of `gather_`.
        """
        self._count_half(flat)
        for group, ranks, index in self._levels:
            part = flat.chunk(ranks)[index]
            dist.reduce_scatter_single(part, flat, group=group)
            flat = part

    def gather_(self, flat: Tensor) -> None:
        """Every part of flat ← that of its owner, in place."""
        self._count_half(flat)
        wholes = []
        for _, ranks, index in self._levels:
            wholes.append(flat)
            flat = flat.chunk(ranks)[index]
        for (group, _, _), whole in zip(reversed(self._levels), reversed(wholes), strict=True):
            dist.all_gather_single(whole, flat, group=group)
            flat = whole

    def sum_rounded_(self, flat: Tensor) -> None:
        """flat ← Σ over ranks, in place, sent as `sent_as`; of any length."""
        topology, dtype = self.topology, self.sent_as
        assert dtype is not None
        if topology.world == 1:
            return
        whole = flat.new_empty(divisible(flat.numel(), topology), dtype=dtype)
        whole[: flat.numel()] = flat
        whole[flat.numel() :] = 0
        first = part_of(topology.rank, topology) * (len(whole) // topology.world)
        part = self._scattered(whole, flat.dtype)
        whole[first : first + len(part)] = part
        self.gather_(whole)
        flat.copy_(whole[: flat.numel()])

    def scatter_rounded_(self, flat: Tensor) -> None:
        """`scatter_`, sent as `sent_as`; the other parts stay as they are."""
        if self.topology.world > 1:
            assert self.sent_as is not None
            first = part_of(self.topology.rank, self.topology)
            part = self._scattered(flat.to(self.sent_as), flat.dtype)
            flat[first * len(part) : (first + 1) * len(part)] = part

    def _scattered(self, rounded: Tensor, dtype: torch.dtype) -> Tensor:
        """This rank's part of Σ over ranks of what each has rounded, in `dtype`.

        Bytes are exchanged, which every backend can, and summed here.
        """
        self._count_half(rounded)
        sent = part = rounded
        for group, ranks, _ in self._levels:
            received = torch.empty_like(sent)
            bytes_in, bytes_out = received.view(torch.uint8), sent.view(torch.uint8)
            dist.all_to_all_single(bytes_in, bytes_out, group=group)
            pieces = received.view(ranks, -1)
            part = pieces[0].to(dtype)
            for piece in pieces[1:]:
                part += piece
            sent = part.to(rounded.dtype)
        return part

    def _count_half(self, flat: Tensor) -> None:
        if self.topology.world > 1:
            self.wire.add(reduction_bytes(flat.nbytes, self.topology) / 2)
