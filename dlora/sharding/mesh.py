"""Who is where: ranks, nodes, and the placement of W0 over them."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch.distributed as dist

from dlora.errors import UsageError

BASES = ("none", "node", "world")


@dataclass(frozen=True)
class Topology:
    """Ranks in node-major order: node k holds the ranks k·ranks_per_node and following."""

    rank: int
    world: int
    ranks_per_node: int

    @classmethod
    def current(cls, ranks_per_node: int | None = None) -> Topology:
        """The ranks of the default process group; one process where there is none.

        Args:
            ranks_per_node: overrides LOCAL_WORLD_SIZE, as when one machine stands in for several.

        Raises:
            UsageError: the launcher started several processes, and there is no process group: each
                would train an adapter of its own.
        """
        if not dist.is_initialized():
            if (started := os.environ.get("WORLD_SIZE", "1")) != "1":
                raise UsageError(
                    f"shard: {started} processes were started (WORLD_SIZE) and have no process "
                    "group; call torch.distributed.init_process_group() first"
                )
            return cls(0, 1, 1)
        world = dist.get_world_size()
        local = ranks_per_node or int(os.environ.get("LOCAL_WORLD_SIZE", world))
        return cls(dist.get_rank(), world, min(local, world))

    @property
    def uneven(self) -> bool:
        return self.world % self.ranks_per_node != 0

    @property
    def nodes(self) -> int:
        return -(-self.world // self.ranks_per_node)

    @property
    def node(self) -> int:
        return self.rank // self.ranks_per_node


@dataclass(frozen=True)
class Placement:
    """Where W0 lives: each of `replicas` groups of `shard_size` consecutive ranks holds it once.

    With `offload` the ranks' parts lie in host memory and are copied to the device when gathered.
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
        UsageError: `base` is unknown, nodes hold unequal numbers of ranks where that matters, or
            there is nothing to offload.
    """
    if base not in BASES:
        raise UsageError(f"sharding.base: {base!r} is none of {', '.join(BASES)}")
    if base == "node" and topology.uneven:
        raise UsageError(
            f"sharding.base: node needs equally many ranks on every node, but {topology.world} "
            f"ranks do not divide into nodes of {topology.ranks_per_node}"
        )
    sizes = {"none": 1, "node": topology.ranks_per_node, "world": topology.world}
    size = sizes[base]
    if offload and size == 1:
        raise UsageError("sharding.cpu_offload needs W0 divided over two ranks or more")
    return Placement(engine, base, size, topology.world // size, offload)
