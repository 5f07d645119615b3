"""One data set for all ranks of a node: its first rank encodes it and sends the others its tokens.

    first rank    encodes ──> store: how many tokens, the report; or its error
                     │
    the others    wait    <── plain tensors, by gloo, in a process group of this node alone

This is before the run has a process group, since what is wrong with a record is said before ranks
meet; and beside the store, which is on one node, while every node encodes for itself.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from dlora.data import Dataset
from dlora.errors import TransientError, UsageError
from dlora.runtime.ranks import Ranks
from dlora.sharding.topology import Topology

_DTYPES = (torch.int32, torch.int32, torch.int64)  # of `Dataset.arrays`
_ERRORS = {"usage": UsageError, "passes": TransientError, "crash": RuntimeError}
_MOST_BETWEEN_LOOKS = 0.25  # seconds


class NodeData:
    """What the ranks of one node exchange of their data, while they prepare a run.

    Args:
        limit_seconds: that the first rank may take to encode a data set.
    """

    def __init__(self, ranks: Ranks, topology: Topology, limit_seconds: float) -> None:
        self._ranks, self._limit_seconds = ranks, limit_seconds
        self._first = topology.node * topology.ranks_per_node
        end = min(self._first + topology.ranks_per_node, topology.world)
        self._others = range(self._first + 1, end)

    @contextlib.contextmanager
    def preparing(self) -> Iterator[None]:
        """Around all of the preparation: inside, an error lets no other rank wait for this one."""
        try:
            yield
        except Exception:
            if self._ranks.store is not None:
                self._ranks.store.set(self._failed(self._ranks.rank), "")
            raise

    def once(self, key: str, load: Callable[[], Dataset]) -> Dataset:
        """What `load` returns on the first rank of the node, on all of them.

        Where one of the others fails meanwhile, the run is about to end: `load` is called here.

        Args:
            key: of the configuration, such as "data.train".

        Raises:
            UsageError, TransientError: as `load`, on all ranks of the node; or they cannot reach
                each other; or the first one takes longer than it may.
        """
        store, topic = self._ranks.store, f"tokens/{key}/{self._first}"
        if store is None or not self._others:
            return load()
        if self._ranks.rank == self._first:
            return self._sent(store, topic, load)
        store.set(self._ready(topic, self._ranks.rank), "")
        if not self._comes(topic, self._first, self._limit_seconds):
            raise UsageError(f"rank {self._first} has failed")  # which it says itself, before this
        return self._received(store, json.loads(store.get(topic)), load)

    def _sent(self, store: dist.Store, topic: str, load: Callable[[], Dataset]) -> Dataset:
        try:
            dataset = load()
        except Exception as error:
            store.set(topic, json.dumps({"error": [_kind(error), str(error)]}))
            raise
        ready = {rank: self._ready(topic, rank) for rank in self._others}
        limit = self._ranks.timeout_seconds
        if not all(self._comes(key, rank, limit) for rank, key in ready.items()):
            store.set(topic, json.dumps({"alone": True}))
            return dataset
        name = f"{topic}/{secrets.token_hex(8)}"  # of this exchange and no later one
        lengths = [len(array) for array in dataset.arrays]
        store.set(topic, json.dumps({"group": name, "lengths": lengths, "about": dataset.about}))
        # A copy of each while it is sent: the arrays themselves cannot be written to.
        self._exchange(name, (torch.from_numpy(np.array(array)) for array in dataset.arrays))
        for key in (topic, *ready.values()):
            store.delete_key(key)
        return dataset

    def _received(
        self, store: dist.Store, told: dict[str, Any], load: Callable[[], Dataset]
    ) -> Dataset:
        if "error" in told:
            kind, message = told["error"]
            raise _ERRORS[kind](message)
        if "alone" in told:
            return load()
        sizes = zip(told["lengths"], _DTYPES, strict=True)
        tensors = [torch.empty(length, dtype=dtype) for length, dtype in sizes]
        self._exchange(told["group"], tensors)
        return Dataset.of([tensor.numpy() for tensor in tensors], told["about"])

    def _exchange(self, name: str, tensors: Iterable[Tensor]) -> None:
        """The first rank's tensors ──> those of the others; all have them when it returns."""
        ranks, rank = self._ranks, self._ranks.rank - self._first
        timeout = timedelta(seconds=ranks.timeout_seconds)
        assert ranks.store is not None
        try:
            store = dist.PrefixStore(name, ranks.store)
            group: Any = dist.ProcessGroupGloo(store, rank, 1 + len(self._others), timeout)
            for tensor in tensors:
                group.broadcast(tensor, 0).wait()
            group.barrier().wait()
        except RuntimeError as error:
            raise TransientError(
                f"rank {ranks.rank} on {socket.gethostname()} cannot reach the other ranks of its "
                f"node: {error}; GLOO_SOCKET_IFNAME chooses the network"
            ) from error

    def _comes(self, key: str, rank: int, seconds: float) -> bool:
        """Wait for a key that a rank sets; returns False if it fails before.

        Raises:
            TransientError: neither comes in so many seconds.
        """
        store, until, pause = self._ranks.store, time.monotonic() + seconds, 0.001
        assert store is not None
        while not store.check([key]):
            if store.check([self._failed(rank)]):
                return False
            if time.monotonic() > until:
                where = f"rank {rank} on {self._ranks.host(rank)}"
                raise TransientError(f"{where} has not got so far with the data in {seconds:g} s")
            time.sleep(pause)
            pause = min(2 * pause, _MOST_BETWEEN_LOOKS)
        return True

    @staticmethod
    def _failed(rank: int) -> str:
        return f"tokens/failed/{rank}"

    @staticmethod
    def _ready(topic: str, rank: int) -> str:
        return f"{topic}/ready/{rank}"


def _kind(error: Exception) -> str:
    if isinstance(error, UsageError):
        return "usage"
    return "passes" if isinstance(error, TransientError) else "crash"
