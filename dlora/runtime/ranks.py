"""The process: its ranks, its device, its verdicts, and how it ends."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from dlora.errors import TransientError, UsageError
from dlora.runtime import failure as told
from dlora.runtime.exit_status import ToldError, ToldTransientError, as_told, print_error

PARTING_SECONDS = 10.0  # that rank 0 waits for the others to read what it is about to take along
JOINING_SECONDS = 120.0  # in which all ranks have to come, and then to reach each other
# As long as this process, which may host it: others may come late to ask what was told.
_kept: dict[str, dist.Store] = {}


@dataclass
class Runtime:
    """One process of a run. With a world of 1 there is neither a store nor a process group.

    Attributes:
        timeout_seconds: that it waits for another rank.
        is_telling: whether other ranks may have told something.
    """

    rank: int
    world: int
    device: torch.device
    store: dist.Store | None
    timeout_seconds: float = 600.0
    is_telling: bool = False

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
        _kept["store"] = store
        return cls(rank, world, device, store, timeout_seconds)

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
            print_error(line)

    def agree(
        self, topic: str, work: Callable[[], tuple[Any, str]], patience_seconds: float = 0.0
    ) -> Any:
        """Do the same preparation on every rank, and go on only if all of them succeeded alike.

        Args:
            topic: name of the exchange.
            work: returns (result, fingerprint); a `UsageError` in it is the user's mistake.
            patience_seconds: how much longer rank 0 may need than the others wait for anything.

        Raises:
            UsageError: on every rank, with the first failing rank's message; or if fingerprints
                differ, as when two nodes hold different data files. Where there are several ranks,
                rank 0 has printed it before any of them could leave: an agent ends all ranks as
                soon as one of them has.
            TransientError: likewise, where that is what the first failing rank has met.
        """
        result, fingerprint, failure = None, "", None
        try:
            result, fingerprint = work()
        except (UsageError, TransientError) as error:
            if self.store is None:
                raise
            failure = [str(error), isinstance(error, TransientError)]
        if self.store is None:
            return result
        self.store.set(f"{topic}/{self.rank}", json.dumps([failure, fingerprint]))
        verdict = self._verdict(topic) if self.main else None
        verdict = self.broadcast(f"{topic}/verdict", verdict, patience_seconds)
        if verdict is not None:
            self._part(topic)
            raise as_told(*verdict)
        return result

    @contextlib.contextmanager
    def telling(self) -> Iterator[None]:
        """Inside, what goes wrong on one rank alone is told to the others."""
        self.is_telling = True
        try:
            yield
        except (UsageError, TransientError) as error:
            raise self.tell(error) from error
        except RuntimeError as error:
            if (heard := self.heard(error)) is not None:
                raise heard from error
            raise

    def tell(self, error: UsageError | TransientError) -> UsageError | TransientError:
        """An error outside `agree`, printed by the first rank that has one."""
        if self.store is None or isinstance(error, (ToldError, ToldTransientError)):
            return error
        message, passes = str(error), isinstance(error, TransientError)
        if not self.main and not message.startswith("rank "):
            message = f"rank {self.rank}: {message}"
        if told.tell(self.store, message, passes):
            print_error(message)
        return self._left(error, message, passes)

    def heard(self, error: Exception) -> UsageError | TransientError | None:
        """What another rank has told, if any, where that may be why this one has met `error`."""
        line = self.told_line()
        return None if line is None else self._left(error, *line)

    def told_line(self) -> tuple[str, bool] | None:
        """(message, whether it may pass) that a rank has told, if any: others wait in vain."""
        return None if self.store is None else told.line(self.store)

    def _left(self, error: Exception, message: str, passes: bool) -> UsageError | TransientError:
        """What was told, once nobody waits for this rank any more."""
        if self.device.type == "cpu":  # NCCL's peers wait all the same, and it may for them
            told.abandon(error)
        self._part("told")
        return as_told(message, passes)

    def _verdict(self, topic: str) -> tuple[str, bool] | None:
        """(message, whether it may pass) of the first rank that failed, printed; None: none did."""
        assert self.store is not None
        reports = [self._get(f"{topic}/{rank}") for rank in range(self.world)]
        for rank, (failure, fingerprint) in enumerate(reports):
            if failure is None and fingerprint == reports[0][1]:
                continue
            if failure is None:
                message, passes = f"{topic}: rank {rank} sees something else than rank 0", False
            else:
                message, passes = failure
                message = f"rank {rank}: {message}" if rank else message
            print_error(message)
            return message, passes
        return None

    def gather(self, topic: str, value: Any) -> list[Any]:
        """The values of all ranks, JSON-like and in their order, on every rank."""
        if self.store is None:
            return [value]
        self.store.set(f"{topic}/{self.rank}", json.dumps(value))
        ranks = range(self.world if self.main else 0)
        return self.broadcast(topic, [self._get(f"{topic}/{r}") for r in ranks])

    def broadcast(self, topic: str, value: Any, patience_seconds: float = 0.0) -> Any:
        """Rank 0's value, JSON-like, on every rank.

        Args:
            patience_seconds: how much longer than for all else the others wait for it.
        """
        if self.store is None:
            return value
        if self.main:
            self.store.set(topic, json.dumps(value))
        if patience_seconds:
            with contextlib.suppress(dist.DistStoreError):
                self.store.wait([topic], timedelta(seconds=patience_seconds))
        return self._get(topic)

    def _get(self, key: str) -> Any:
        """What a rank has left in the store, or will leave there."""
        assert self.store is not None
        if self.is_telling:
            told.wait(self.store, key, self.timeout_seconds)
        return json.loads(self.store.get(key))

    def join(self) -> None:
        """Start the process group: NCCL beside gloo where there are GPUs, gloo elsewhere.

        Before anything is read, all ranks have come and one all-reduce has gone through.

        Raises:
            TransientError: on every rank that is there, naming those that are not and their hosts,
                or saying why the ranks do not reach each other.
        """
        if self.world == 1:
            return
        seconds = min(JOINING_SECONDS, self.timeout_seconds)
        if missing := self._missing(timedelta(seconds=seconds)):
            raise TransientError(
                f"no sign within {seconds:g} s of {missing}; see what became of it"
            )
        cuda = self.device.type == "cuda"
        try:
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if cuda else "gloo",
                store=self.store,
                rank=self.rank,
                world_size=self.world,
                timeout=timedelta(seconds=self.timeout_seconds),
                device_id=self.device if cuda else None,
            )
            reached = torch.ones(1, device=self.device)
            dist.all_reduce(reached, async_op=True).wait(timedelta(seconds=seconds))
        except RuntimeError as error:
            raise TransientError(
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


def _device(local_rank: int) -> torch.device:
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank)
        return torch.device("cuda", local_rank)
    return torch.device("cpu")
