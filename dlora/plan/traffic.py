"""Bytes on the wire per optimizer step, inside nodes and between them.

A ring all-gather of N bytes over p ranks sends N·(p−1)/p from each rank to the next one. In the
order of ranks, which is node by node, the last rank of a node has its next one on another node: a
shard group wider than a node sends N·(p−1)/p over the link of every node, out and in, and the same
from rank to rank inside. The reduction of gradients of N bytes over M nodes of G ranks is a ring
inside the node, one across with 1/G from each rank, and one inside again: 2·N·(G−1)/G per rank
inside, 2·N·(M−1)/M per node's link.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from torch import nn

from dlora.plan.gathers import Unit
from dlora.plan.state import share_of, state_of
from dlora.plan.workload import Workload
from dlora.sharding.comm_bytes import ring_gather_bytes
from dlora.sharding.replica.hierarchical_reduce import is_hierarchical, padded, reduction_bytes
from dlora.sharding.replica.optimizer_state import item
from dlora.sharding.topology import Placement, Topology


@dataclass(frozen=True)
class Sent:
    """Bytes of a kind of collective.

    Attributes:
        rank: ring-equivalent bytes that a rank sends in all, as its counter counts them.
        inside: that a rank sends to ranks of its node, at most.
        between: that leave a node over its link, and as many come in.
    """

    rank: float = 0.0
    inside: float = 0.0
    between: float = 0.0


@dataclass(frozen=True)
class Traffic:
    """Bytes by purpose.

    Attributes:
        gathers: of W0, per optimizer step in steady state.
        reduction: per optimizer step, with what a divided optimizer sends after it.
        audit, mask: of one audit, and of one sum over ranks by the method.
    """

    gathers: Sent
    reduction: Sent
    audit: Sent
    mask: Sent = Sent()

    @property
    def inside(self) -> float:
        """Bytes per step that a rank sends inside its node, at most."""
        return self.gathers.inside + self.reduction.inside

    @property
    def between(self) -> float:
        """Bytes per step over a node's link, each way."""
        return self.gathers.between + self.reduction.between


def traffic_of(
    units: Iterable[Unit],
    held: Collection[str],
    trained: Mapping[str, nn.Parameter],
    *,
    placement: Placement,
    topology: Topology,
    workload: Workload,
    divided: bool,
    summed: int = 0,
    summed_always: int = 0,
    teacher: float = 0.0,
) -> Traffic:
    """The traffic of a rank; see `dlora.plan.memory.memory_of` for the arguments.

    Args:
        summed: elements of the sum over ranks that the adapters' method makes at some steps.
        summed_always: those of its sum in every step, which counts with the reduction.
        teacher: bytes that a rank sends in gathers of another base, which count with those of W0.
    """
    size = placement.shard_size
    coming = (unit for unit in units if not (unit.always or unit.path in held))
    gathers = sum(unit.times * ring_gather_bytes(unit.gathered, size) for unit in coming)
    gathers += teacher
    sent, reduced, groups = workload.gradient_bytes, 0.0, workload.groups(trained)
    for optimizer, named in groups:
        reduced += share_of(optimizer, divided).wire_bytes(named, topology, sent)
        reduced += state_of(optimizer, named, topology, divided).wire
    own, always = (
        reduction_bytes(padded(elements, topology) * item(trained), topology) if elements else 0.0
        for elements in (summed, summed_always)
    )
    reduced += always
    checksums = len(groups) * ring_gather_bytes(8 * topology.world, topology.world)
    return Traffic(
        gathers=_in_a_ring(gathers, size, topology),
        reduction=_in_two_levels(reduced, topology),
        audit=_in_a_ring(checksums, topology.world, topology),
        mask=_in_two_levels(own, topology),
    )


def _in_a_ring(sent: float, ranks: int, topology: Topology) -> Sent:
    """Of rings of `ranks` consecutive ranks."""
    crosses = ranks > topology.ranks_per_node
    return Sent(
        rank=sent,
        inside=sent if min(ranks, topology.ranks_per_node) > 1 else 0.0,
        between=sent if crosses else 0.0,
    )


def _in_two_levels(sent: float, topology: Topology) -> Sent:
    """Of the reduction: its two levels have a fixed ratio."""
    if not is_hierarchical(topology):
        return _in_a_ring(sent, topology.world, topology)
    node = Topology(0, topology.ranks_per_node, topology.ranks_per_node)
    inside = sent * reduction_bytes(1, node) / reduction_bytes(1, topology)
    return Sent(sent, inside, (sent - inside) * topology.ranks_per_node)
