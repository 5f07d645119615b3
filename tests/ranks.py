"""Several processes for a test: persistent workers, each a rank, that run a test's functions.

    pools = Pools(tmp_path_factory.mktemp("ranks"))     # the fixture `pools` in conftest.py
    results = pools(2).run(work, 1, "two")              # work(1, "two") on 2 ranks, by rank

A worker imports the function by the name of its module. Each call gets a process group of its own
(gloo on the loopback, a file as its store), a random state that differs between ranks, and a time
limit. What a rank prints lies in a file and is shown when a call fails; then all workers are ended,
and the next call starts new ones. Workers are forked from a server that has imported what
`preloaded.py` names, except `fresh` ones, whose memory can be measured.
"""

import contextlib
import faulthandler
import gc
import importlib
import multiprocessing
import os
import pickle
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
LIMIT_SECONDS = 240.0
GRACE_SECONDS = 2.0  # in which the other ranks may fail as well, before they are ended
SHOWN_CHARACTERS = 3000


class RankFailure(AssertionError):  # noqa: N818
    """A call that failed on some rank: who, why, and what every rank had printed."""


class Pool:
    """`world` worker processes, started at the first call."""

    def __init__(self, world: int, directory: Path, *, fresh: bool = False) -> None:
        self.world, self.fresh = world, fresh
        self._directory, self._starts, self._calls = directory, 0, 0
        self._workers: list[Any] = []
        self._pipes: list[Connection] = []

    def run(
        self,
        function: Callable[..., Any],
        *args: Any,
        ranks_per_node: int | None = None,
        limit: float = LIMIT_SECONDS,
    ) -> list[Any]:
        """`function(*args)` on every rank at once; results by rank.

        Args:
            function: at the top level of a module. With a world of 1 there is no process group.
            ranks_per_node: LOCAL_WORLD_SIZE, where it is not the world.
            limit: seconds, after which the call has failed.
        """
        if not self._workers:
            self._start()
        self._calls += 1
        name = (function.__module__, function.__qualname__)
        request = pickle.dumps((self._calls, ranks_per_node or self.world, name, args))
        for pipe in self._pipes:
            pipe.send_bytes(request)
        replies = self._replies(time.monotonic() + limit)
        failed = {rank: reply for rank, reply in replies.items() if not reply[0]}
        if failed or len(replies) < self.world:
            self._show_stacks([rank for rank in range(self.world) if rank not in replies])
            silent = "was ended" if failed else f"no answer within {limit:g} s"
            told = [replies.get(rank, (False, silent)) for rank in range(self.world)]
            self._end()
            raise RankFailure(self._report(function.__qualname__, told))
        return [replies[rank][1] for rank in range(self.world)]

    def close(self) -> None:
        """End the workers."""
        for pipe in self._pipes:
            pipe.close()
        for worker in self._workers:
            worker.join(GRACE_SECONDS)
        self._end()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn") if self.fresh else server()
        self._starts += 1
        self._directory.mkdir(parents=True, exist_ok=True)
        for rank in range(self.world):
            ours, theirs = context.Pipe()
            arguments = (rank, self.world, str(self._store), str(self._log(rank)), sys.path, theirs)
            worker = context.Process(target=_work, args=arguments, daemon=True)
            worker.start()
            theirs.close()
            self._workers.append(worker)
            self._pipes.append(ours)

    def _replies(self, deadline: float) -> dict[int, tuple[bool, Any]]:
        """(succeeded, result or traceback) by rank; ranks that are stuck are left out."""
        replies: dict[int, tuple[bool, Any]] = {}
        waiting = dict(zip(self._pipes, range(self.world), strict=True))
        while waiting and (ready := wait(list(waiting), max(0.0, deadline - time.monotonic()))):
            for pipe in ready:
                assert isinstance(pipe, Connection)
                rank = waiting.pop(pipe)
                try:
                    replies[rank] = pickle.loads(pipe.recv_bytes())
                except EOFError:
                    self._workers[rank].join(GRACE_SECONDS)
                    replies[rank] = (False, f"ended with status {self._workers[rank].exitcode}")
                if not replies[rank][0]:
                    deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        return replies

    def _show_stacks(self, ranks: list[int]) -> None:
        """Let stuck ranks write down where they are."""
        for rank in ranks:
            os.kill(self._workers[rank].pid, signal.SIGUSR1)
        time.sleep(0.3 if ranks else 0)

    def _end(self) -> None:
        for worker in self._workers:
            if worker.is_alive():
                os.kill(worker.pid, signal.SIGKILL)
            worker.join()
        self._workers, self._pipes = [], []

    def _report(self, name: str, told: list[tuple[bool, Any]]) -> str:
        lines = [f"{name} failed on {self.world} rank(s)"]
        for rank, (succeeded, text) in enumerate(told):
            printed = self._log(rank).read_text(errors="replace")
            # below the stacks of a process that died: a list of modules, longer than what is shown
            printed = printed.partition("\nExtension modules:")[0][-SHOWN_CHARACTERS:].strip()
            lines += [f"--- rank {rank}: {'done' if succeeded else text}", printed]
        return "\n".join(lines)

    @property
    def _store(self) -> Path:
        return self._directory / f"store-{self._starts}"

    def _log(self, rank: int) -> Path:
        return self._directory / f"rank-{rank}-of-{self.world}.{self._starts}.log"


def server() -> ForkServerContext:
    """Where processes are forked from that have imported what `preloaded.py` names."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.preloaded"])
    with contextlib.chdir(ROOT):  # where it finds that
        forkserver.ensure_running()
    return context


class Pools:
    """Pools by their number of ranks, so that the tests of a file share them."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._pools: dict[int, Pool] = {}

    def __call__(self, world: int) -> Pool:
        if world not in self._pools:
            self._pools[world] = Pool(world, self._directory / f"world-{world}")
        return self._pools[world]

    def close(self) -> None:
        for pool in self._pools.values():
            pool.close()


# In a worker ------------------------------------------------------------------------------------

current_store: Any = None  # of the running call; a torch.distributed.Store, None in a world of 1


def _work(
    rank: int, world: int, store_path: str, log: str, path: list[str], pipe: Connection
) -> None:
    """The life of a worker: answer calls until the pipe is closed."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout = sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    sys.path[:] = path
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), GLOO_SOCKET_IFNAME="lo"
    )
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1)
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    store = dist.FileStore(store_path, world) if world > 1 else None
    while True:
        try:
            request = pipe.recv_bytes()
        except EOFError:
            return
        reply: tuple[bool, Any]
        try:
            call, ranks_per_node, (module, name), args = pickle.loads(request)
            os.environ["LOCAL_WORLD_SIZE"] = str(ranks_per_node)
            torch.manual_seed(1000 * call + rank)
            function = _found(module, name)
            with _group(rank, world, call, store):
                result = function(*args)
            reply = (True, result)
        except BaseException:
            reply = (False, traceback.format_exc())
        sys.stdout.flush()
        sys.stderr.flush()
        pipe.send_bytes(pickle.dumps(reply))


def _found(module: str, name: str) -> Callable[..., Any]:
    """What imports have made is looked through no more when garbage is collected, which each call
    does at its end: those hundreds of thousands of objects took longer than many a test."""
    known = module in sys.modules
    function = getattr(importlib.import_module(module), name)
    if not known:
        gc.freeze()
    return function


@contextmanager
def _group(rank: int, world: int, call: int, store: Any) -> Iterator[None]:
    """The process group of one call. A barrier ends it, so that no rank leaves another behind."""
    global current_store
    if world == 1:
        yield
        return
    import torch.distributed as dist

    current_store = dist.PrefixStore(f"call-{call}", store)
    dist.init_process_group(
        "gloo", store=current_store, rank=rank, world_size=world, timeout=timedelta(seconds=180)
    )
    yield
    gc.collect()  # what still holds parts of the group, and with them its connections
    dist.barrier()
    dist.destroy_process_group()
