"""Ranks and nodes, and the placement of W0 over them."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch.distributed as dist

from dlora.errors import UsageError

BASES = ("none", "node", "world")


@dataclass(frozen=True)
class Topology:
    """Ranks in node-major order: node k has the ranks k·ranks_per_node and following.

    Where a scheduler has put unlike numbers of ranks on hosts (Ray: 4 and 2), a node has as many
    ranks as divide all of these, so that no node spans two hosts and all ranks agree on the nodes.

    Attributes:
        largest: the most ranks of one host; 0 where that is not known.
    """

    rank: int
    world: int
    ranks_per_node: int
    largest: int = 0

    @classmethod
    def over(cls, rank: int, here: Sequence[int], ranks_per_node: int | None = None) -> Topology:
        """The topology of one rank.

        Args:
            here: by rank, the number of ranks on its host.
            ranks_per_node: overrides what follows from `here`.
        """
        if ranks_per_node is not None:
            return cls(rank, len(here), ranks_per_node)
        return cls(rank, len(here), min(math.gcd(*here), len(here)), max(here))

    @classmethod
    def current(cls, ranks_per_node: int | None = None) -> Topology:
        """The ranks of the default process group, collectively; one process where there is none.

        Args:
            ranks_per_node: overrides LOCAL_WORLD_SIZE, as when one machine stands in for several.

        Raises:
            UsageError: the launcher started several processes without a process group, so that each
                would train an adapter of its own.
        """
        if not dist.is_initialized():
            if (started := os.environ.get("WORLD_SIZE", "1")) != "1":
                raise UsageError(
                    f"shard: {started} processes were started (WORLD_SIZE) and have no process "
                    "group; call torch.distributed.init_process_group() first"
                )
            return cls(0, 1, 1)
        rank, world = dist.get_rank(), dist.get_world_size()
        if ranks_per_node is not None:
            return cls(rank, world, min(ranks_per_node, world))
        # Over the store: a tensor would have to be on this rank's own device, which with NCCL alone
        # may not have been chosen yet.
        assert dist.group.WORLD is not None
        store = dist.PrefixStore("dlora/ranks of a node", dist.group.WORLD.get_group_store())
        store.set(str(rank), os.environ.get("LOCAL_WORLD_SIZE", str(world)))
        return cls.over(rank, [int(store.get(str(other))) for other in range(world)])

    @property
    def uneven(self) -> bool:
        """Whether hosts have numbers of ranks without a common divisor above 1."""
        return self.world % self.ranks_per_node != 0 or self.ranks_per_node == 1 < self.largest

    @property
    def nodes(self) -> int:
        """Number of nodes."""
        return -(-self.world // self.ranks_per_node)

    @property
    def node(self) -> int:
        """Index of this rank's node."""
        return self.rank // self.ranks_per_node


@dataclass(frozen=True)
class Placement:
    """Where W0 is stored: each of `replicas` groups of `shard_size` consecutive ranks has it once.

    Attributes:
        offload: shards are in host memory, and copied to the device when they are gathered.
    """

    engine: str
    base: str
    shard_size: int
    replicas: int
    offload: bool = False


def resolve_placement(
    engine: str, base: str, topology: Topology, *, offload: bool = False
) -> Placement:
    """Turn the two settings into group sizes.

    Raises:
        UsageError: `base` is unknown, the ranks do not divide into equal nodes (`node`), or W0 is
            not sharded, so that it cannot be offloaded.
    """
    if base not in BASES:
        raise UsageError(f"sharding.base: expected one of {', '.join(BASES)}, got {base!r}")
    if base == "node" and topology.uneven:
        found = f"{topology.world} ranks do not divide into nodes of {topology.ranks_per_node}"
        if topology.largest > 1:
            found = f"one has {topology.largest}, and others a number without a common divisor"
        raise UsageError(
            f"sharding.base: node needs a number that divides the ranks of every node, but {found}"
        )
    sizes = {"none": 1, "node": topology.ranks_per_node, "world": topology.world}
    size = sizes[base]
    if offload and size == 1:
        raise UsageError("sharding.cpu_offload: needs W0 sharded over two ranks or more")
    return Placement(engine, base, size, topology.world // size, offload)
