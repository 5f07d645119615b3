"""A program, as `python -m` runs it, in processes that have torch and transformers already.

    ranks = start(2, ["dlora.train", "--config", "run.yaml"], log, package=copy)
    assert status(ranks) == 0, log.read_text()

Processes are forked from the server that `ranks.py` fills, and import dlora anew: from `package`,
which may be a copy. An interpreter of its own takes 7 s for its imports. Each process is a rank of
one node as torchrun starts them; the agent alone is missing.
"""

import contextlib
import multiprocessing
import os
import runpy
import secrets
import signal
import socket
import sys
import time
from collections.abc import Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from ranks import PRELOADED

LIMIT_SECONDS = 240.0


def start(world: int, words: Sequence[str], log: Path, package: Path) -> list[ForkServerProcess]:
    """Every rank of `python -m *words`, all of them printing to `log`.

    Args:
        package: the folder to import dlora from.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    [port], ranks = free_ports(1), []
    for rank in range(world):
        environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world}
        environment |= {"LOCAL_WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        named = {key: str(value) for key, value in environment.items()}
        process = context.Process(target=_run, args=(words, str(log), str(package), named))
        process.start()
        ranks.append(process)
    return ranks


def status(ranks: Sequence[ForkServerProcess]) -> int:
    """The exit status of all; that of the first that failed, whereupon the others are killed."""
    until = time.monotonic() + LIMIT_SECONDS
    while any(rank.exitcode is None for rank in ranks):
        failed = [rank.exitcode for rank in ranks if rank.exitcode]
        if failed or time.monotonic() > until:
            kill(ranks)
            return failed[0] if failed else -signal.SIGKILL
        time.sleep(0.05)
    return next((rank.exitcode for rank in ranks if rank.exitcode), 0)


def kill(ranks: Sequence[ForkServerProcess]) -> None:
    """SIGKILL to every rank."""
    for rank in ranks:
        rank.kill()
        rank.join()


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on, all of them different, and below those that the kernel hands
    out: another test's connection may take one of those before its owner does."""
    found: list[int] = []
    while len(found) < count:
        port = 10000 + secrets.randbelow(10000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("0.0.0.0", port))
            found += [port] * (port not in found)
    return found


def _run(words: Sequence[str], log: str, package: str, environment: dict[str, str]) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout, sys.stderr = (open(n, "w", buffering=1, closefd=False) for n in (1, 2))  # noqa: SIM115
    os.environ.update(environment)
    for name in [name for name in sys.modules if name.partition(".")[0] == "dlora"]:
        del sys.modules[name]
    sys.path.insert(0, package)
    sys.argv = list(words)
    runpy.run_module(words[0], run_name="__main__", alter_sys=True)
