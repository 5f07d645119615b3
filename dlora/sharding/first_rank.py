"""What rank 0 finds out for all ranks, as whether a file can be read, through the store."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from dlora.errors import UsageError
from dlora.sharding.topology import Topology

_turns = itertools.count()  # of calls, which all ranks make in the same order


def from_first(topology: Topology, make: Callable[[], Any]) -> Any:
    """What `make` returns on rank 0, JSON-like, on every rank. No collective, but for all ranks.

    Raises:
        UsageError: on every rank, that of rank 0.
    """
    if topology.world == 1:
        return make()
    assert dist.group.WORLD is not None
    store = dist.PrefixStore(
        f"dlora/from rank 0/{next(_turns)}", dist.group.WORLD.get_group_store()
    )
    if topology.rank == 0:
        try:
            said = {"made": make()}
        except UsageError as error:
            said = {"error": str(error)}
        except Exception as error:
            said = {"error": f"rank 0: {type(error).__name__}: {error}"}
            store.set("said", json.dumps(said))
            raise
        store.set("said", json.dumps(said))
    else:
        said = json.loads(store.get("said"))
    if store.add("read", 1) == topology.world:
        for key in ("said", "read"):
            store.delete_key(key)
    if "error" in said:
        raise UsageError(said["error"])
    return said["made"]
