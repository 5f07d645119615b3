"""The process: its ranks, its device, its verdicts, and how it ends."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from dlora.errors import PeerError, UsageError

PARTING_SECONDS = 10.0  # that rank 0 waits for the others to read what it is about to take along
JOINING_SECONDS = 120.0  # in which all ranks have to come, and then to reach each other


class ToldError(UsageError):
    """A `UsageError` that has been printed, on this rank or on another."""


@dataclass
class Runtime:
    """One process of a run. With a world of 1 there is neither a store nor a process group."""

    rank: int
    world: int
    device: torch.device
    store: dist.Store | None

    @classmethod
    def from_environment(cls, timeout_seconds: float) -> Runtime:
        """Join the rendezvous that torchrun (or its like) put into the environment."""
        world = int(os.environ.get("WORLD_SIZE", 1))
        device = _device(int(os.environ.get("LOCAL_RANK", 0)))
        if world == 1:
            return cls(0, 1, device, None)
        timeout = timedelta(seconds=timeout_seconds)
        store, rank, world = next(iter(dist.rendezvous("env://", timeout=timeout)))
        store.set_timeout(timeout)
        store = dist.PrefixStore("dlora", store)
        store.set(f"host/{rank}", socket.gethostname())
        return cls(rank, world, device, store)

    @property
    def main(self) -> bool:
        """Whether this is the rank that prints and writes."""
        return self.rank == 0

    def say(self, line: str) -> None:
        """Print a line, once for all ranks."""
        if self.main:
            print(line, flush=True)

    def warn(self, line: str) -> None:
        """Print a warning from this rank."""
        print(f"dlora: warning: {line}", file=sys.stderr, flush=True)

    def fail(self, line: str) -> None:
        """Print what ends the run as an error, once for all ranks, which all know of it."""
        if self.main:
            _print_error(line)

    def agree(self, topic: str, work: Callable[[], tuple[Any, str]]) -> Any:
        """Do the same preparation on every rank, and go on only if all of them succeeded alike.

        Args:
            topic: name of the exchange.
            work: returns (result, fingerprint); a `UsageError` in it is the user's mistake.

        Raises:
            UsageError: on every rank, with the first failing rank's message; or if fingerprints
                differ, as when two nodes hold different data files. Where there are several ranks,
                rank 0 has printed it before any of them could leave: an agent ends all ranks as
                soon as one of them has.
        """
        result, fingerprint, message = None, "", ""
        try:
            result, fingerprint = work()
        except UsageError as error:
            message = str(error)
        if self.store is not None:
            self.store.set(f"{topic}/{self.rank}", json.dumps([message, fingerprint]))
            if self.main:
                message = self._verdict(topic)
                if message:
                    _print_error(message)
                self.store.set(f"{topic}/verdict", message)
            message = self.store.get(f"{topic}/verdict").decode()
            if message:
                self._part(topic)
                raise ToldError(message)
        if message:
            raise UsageError(message)
        return result

    def told(self, error: UsageError) -> UsageError:
        """An error outside `agree`, printed by the first rank that has one."""
        if self.store is None or isinstance(error, ToldError):
            return error
        if self.store.add("told", 1) == 1:
            _print_error(str(error) if self.main else f"rank {self.rank}: {error}")
        self._part("told")
        return ToldError(str(error))

    def _verdict(self, topic: str) -> str:
        assert self.store is not None
        reports = [json.loads(self.store.get(f"{topic}/{rank}")) for rank in range(self.world)]
        for rank, (message, fingerprint) in enumerate(reports):
            if message:
                return message if rank == 0 else f"rank {rank}: {message}"
            if fingerprint != reports[0][1]:
                return f"{topic}: rank {rank} sees something else than rank 0"
        return ""

    def least(self, topic: str, value: int | None) -> int | None:
        """The least of the ranks' values, on every rank; None if some rank has none."""
        if self.store is None:
            return value
        self.store.set(f"{topic}/{self.rank}", json.dumps(value))
        if not self.main:
            return self.broadcast(topic, None)
        values = [json.loads(self.store.get(f"{topic}/{rank}")) for rank in range(self.world)]
        return self.broadcast(topic, None if None in values else min(values))

    def broadcast(self, topic: str, value: Any) -> Any:
        """Rank 0's value, JSON-like, on every rank."""
        if self.store is None:
            return value
        if self.main:
            self.store.set(topic, json.dumps(value))
        return json.loads(self.store.get(topic))

    def join(self, timeout_seconds: float) -> None:
        """Start the process group: NCCL beside gloo where there are GPUs, gloo elsewhere.

        Before anything is read, all ranks have come and one all-reduce has gone through.

        Raises:
            PeerError: on every rank that is there, naming those that are not and their hosts, or
                saying why the ranks do not reach each other.
        """
        if self.world == 1:
            return
        seconds = min(JOINING_SECONDS, timeout_seconds)
        if missing := self._missing(timedelta(seconds=seconds)):
            raise PeerError(f"no sign within {seconds:g} s of {missing}; see what became of it")
        cuda = self.device.type == "cuda"
        try:
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if cuda else "gloo",
                store=self.store,
                rank=self.rank,
                world_size=self.world,
                timeout=timedelta(seconds=timeout_seconds),
                device_id=self.device if cuda else None,
            )
            reached = torch.ones(1, device=self.device)
            dist.all_reduce(reached, async_op=True).wait(timedelta(seconds=seconds))
        except RuntimeError as error:
            raise PeerError(
                f"rank {self.rank} on {socket.gethostname()} cannot reach the other ranks "
                f"({self._hosts()}): {error}; see that the network between the hosts is open "
                f"({'NCCL_SOCKET_IFNAME and ' if cuda else ''}GLOO_SOCKET_IFNAME choose it)"
            ) from error

    def _missing(self, timeout: timedelta) -> str:
        """The ranks that do not come, with their hosts; nothing where all of them do."""
        assert self.store is not None
        keys = {rank: f"joining/{rank}" for rank in range(self.world)}
        self.store.set(keys[self.rank], "")
        try:
            self.store.wait(list(keys.values()), timeout)
            return ""
        except RuntimeError:
            absent = [rank for rank, key in keys.items() if not self.store.check([key])]
            return ", ".join(f"rank {rank} on {self._host(rank)}" for rank in absent)

    def _host(self, rank: int) -> str:
        """Where a rank has said that it runs."""
        assert self.store is not None
        key = f"host/{rank}"
        return self.store.get(key).decode() if self.store.check([key]) else "an unknown host"

    def _hosts(self) -> str:
        return ", ".join(dict.fromkeys(self._host(rank) for rank in range(self.world)))

    def leave(self) -> None:
        """End together, so that no rank pulls the store from under another."""
        if dist.is_initialized():
            dist.barrier()
            dist.destroy_process_group()
        else:
            self._part("end")

    def _part(self, topic: str) -> None:
        """Before an end without a process group: where rank 0 hosts the store, it leaves last."""
        if self.store is None or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            return
        others = [f"{topic}/parted/{rank}" for rank in range(1, self.world)]
        if not self.main:
            self.store.set(others[self.rank - 1], "")
            return
        with contextlib.suppress(RuntimeError):  # one that died does not hold up the rest
            self.store.wait(others, timedelta(seconds=PARTING_SECONDS))


def exit_with(main: Callable[[list[str]], int]) -> None:
    """Run an entry point and end the process with its status; a user's mistake is one line and
    status 2, a peer that does not come one line and status 1.
    """
    try:
        status = main(sys.argv[1:])
    except ToldError:
        status = 2
    except UsageError as error:
        _print_error(str(error))
        status = 2
    except PeerError as error:
        _print_error(str(error))
        status = 1
    raise SystemExit(status)


def _print_error(message: str) -> None:
    print(f"dlora: error: {message}", file=sys.stderr, flush=True)


def _device(local_rank: int) -> torch.device:
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank)
        return torch.device("cuda", local_rank)
    return torch.device("cpu")
