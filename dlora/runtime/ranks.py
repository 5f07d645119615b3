"""The ranks of a run: who this process is, where the others are, and how all join and leave."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from dlora.errors import TransientError, UsageError

LEAVING_SECONDS = 10.0  # that rank 0 waits for the others to read the last values of its store
JOINING_SECONDS = 120.0  # in which all ranks have to join, and then to reach each other
# A collective gives up so much later than `PeerWatch`, which commits first and knows who is lost.
LATER_SECONDS = 30.0
# For as long as this process: where it serves the store, others may read it late.
_stores: dict[str, dist.Store] = {}


@dataclass(frozen=True)
class Ranks:
    """One process of a run. With a world of 1 there is neither a store nor a process group.

    Attributes:
        timeout_seconds: how long it waits for another rank.
    """

    rank: int
    world: int
    device: torch.device
    store: dist.Store | None
    timeout_seconds: float = 600.0

    @classmethod
    def from_environment(cls, timeout_seconds: float, device: torch.device) -> Ranks:
        """Join the rendezvous that torchrun (or its like) put into the environment."""
        world = int(os.environ.get("WORLD_SIZE", 1))
        if world == 1:
            return cls(0, 1, device, None)
        timeout = timedelta(seconds=timeout_seconds)
        store, rank, world = next(iter(dist.rendezvous("env://", timeout=timeout)))
        store.set_timeout(timeout)
        store = dist.PrefixStore("dlora", store)
        store.set(f"host/{rank}", socket.gethostname())
        _stores["store"] = store
        return cls(rank, world, device, store, timeout_seconds)

    @property
    def main(self) -> bool:
        """Whether this is the rank that prints and writes."""
        return self.rank == 0

    def join(self, loading_seconds: float = 0.0) -> None:
        """Start the process group: NCCL beside gloo where there are GPUs, gloo elsewhere.

        It returns when all ranks have joined and one all-reduce has succeeded. What raises nothing
        in time is for `PeerWatch`, so NCCL's own handling of errors, which ends the process, is off
        unless the user has set it.

        Args:
            loading_seconds: how long a rank waits for another one until `loaded` is called, if that
                is longer than `timeout_seconds`.

        Raises:
            TransientError: on every rank that joined: some did not join, whose hosts are named, or
                the ranks cannot reach each other.
        """
        if self.world == 1:
            return
        seconds = min(JOINING_SECONDS, self.timeout_seconds)
        if missing := self._missing(timedelta(seconds=seconds)):
            raise TransientError(
                f"{missing} did not join within {seconds:g} s; check the logs there"
            )
        cuda = self.device.type == "cuda"
        if cuda:
            os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
        longest = max(self.timeout_seconds, loading_seconds)
        try:
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if cuda else "gloo",
                store=self.store,
                rank=self.rank,
                world_size=self.world,
                timeout=timedelta(seconds=longest + LATER_SECONDS),
                device_id=self.device if cuda else None,
            )
            reached = torch.ones(1, device=self.device)
            dist.all_reduce(reached, async_op=True).wait(timedelta(seconds=seconds))
        except RuntimeError as error:
            raise TransientError(
                f"rank {self.rank} on {socket.gethostname()} cannot reach the other ranks "
                f"({self._hosts()}): {error}; check that the network between the hosts is open "
                f"({'NCCL_SOCKET_IFNAME and ' if cuda else ''}GLOO_SOCKET_IFNAME choose it)"
            ) from error

    def loaded(self) -> None:
        """Note that weights are read: from here on a rank waits `timeout_seconds` for another.

        In every process group that it has by now: those of nodes and meshes have torch's own limit.
        """
        if dist.is_initialized():
            dist.barrier()  # whoever reads slowly is waited for here, and not in the first step
            timeout = timedelta(seconds=self.timeout_seconds + LATER_SECONDS)
            for group in list(dist.distributed_c10d._world.pg_map):
                dist.distributed_c10d._set_pg_timeout(timeout, group)

    def _missing(self, timeout: timedelta) -> str:
        """The ranks that did not join, with their hosts; "" if all did."""
        assert self.store is not None
        keys = {rank: f"joining/{rank}" for rank in range(self.world)}
        self.store.set(keys[self.rank], "")
        try:
            self.store.wait(list(keys.values()), timeout)
            return ""
        except RuntimeError:
            absent = [rank for rank, key in keys.items() if not self.store.check([key])]
            return ", ".join(f"rank {rank} on {self.host(rank)}" for rank in absent)

    def host(self, rank: int) -> str:
        """The host that a rank has written to the store."""
        assert self.store is not None
        key = f"host/{rank}"
        return self.store.get(key).decode() if self.store.check([key]) else "an unknown host"

    def _hosts(self) -> str:
        return ", ".join(dict.fromkeys(self.host(rank) for rank in range(self.world)))

    def leave(self) -> None:
        """Wait for all ranks, so that the store outlives its readers, and end the process group."""
        if dist.is_initialized():
            self._meet("end")
            dist.destroy_process_group()
        self.part("end")

    def _meet(self, topic: str) -> None:
        """Wait for all ranks over the store: a collective would end after `timeout_seconds`."""
        assert self.store is not None
        keys, pause = [f"{topic}/{rank}" for rank in range(self.world)], 0.001
        self.store.set(keys[self.rank], "")
        while not self.store.check(keys):
            time.sleep(pause)
            pause = min(2 * pause, 0.25)

    def part(self, topic: str) -> None:
        """End without a process group: rank 0, if it serves the store, waits for the others."""
        if self.store is None or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            return
        others = [f"{topic}/parted/{rank}" for rank in range(1, self.world)]
        with contextlib.suppress(RuntimeError):  # one that is gone does not delay the rest
            if not self.main:
                self.store.set(others[self.rank - 1], "")
                return
            self.store.wait(others, timedelta(seconds=LEAVING_SECONDS))


def own_device() -> torch.device:
    """This process's GPU, by LOCAL_RANK; the CPU where there is none.

    Raises:
        UsageError: there are fewer GPUs.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if local_rank >= (visible := torch.cuda.device_count()):
        raise UsageError(
            f"LOCAL_RANK is {local_rank}, and this process sees {visible} GPU(s) "
            f"(CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES', 'not set')}): start as "
            "many processes on a node as it has GPUs, and let each of them see all of these (under "
            "Slurm without --gpus-per-task)"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)
