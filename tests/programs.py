"""A program, as `python -m` runs it, in processes that have torch and transformers already.

    ranks = start(2, ["dlora.train", "--config", "run.yaml"], log, package=copy)
    assert status(ranks) == 0, log.read_text()

Processes are forked from the server that `ranks.py` fills, and with `package` import dlora anew
from a copy. An interpreter of its own takes 7 s for its imports. Each process is a rank as
torchrun starts them; the agent alone is missing.
"""

import contextlib
import ctypes
import gc
import os
import runpy
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from ranks import server

LIMIT_SECONDS = 240.0
_CLONE_NEWNET, _CLONE_NEWNS = 0x40000000, 0x20000  # of sched.h


def start(
    world: int,
    words: Sequence[str],
    log: Path,
    package: Path | None = None,
    *,
    directory: Path | None = None,
    namespaces: Sequence[str] = (),
    **variables: str,
) -> list[ForkServerProcess]:
    """Every rank of `python -m *words`, all of them printing to `log`.

    Args:
        package: the folder to import dlora from, if it is another one.
        directory: where they work and find modules, if not here.
        namespaces: network namespaces, each of them a node with as many ranks.
        variables: environment of the ranks beside what torchrun would set.
    """
    context = server()
    here = variables | {"LOCAL_WORLD_SIZE": str(world // max(len(namespaces), 1))}
    port, ranks = free_port(), []
    for rank in range(world):
        node = namespaces[rank * len(namespaces) // world] if namespaces else None
        places = [path and str(path) for path in (log, package, directory)]
        arguments = (rank, world, port, list(words), *places, node, here)
        ranks.append(context.Process(target=_run, args=arguments))
        ranks[-1].start()
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


def free_port() -> int:
    return free_ports(1)[0]


def become(rank: int, world: int, port: int, out: str, err: str) -> None:
    """This process is a rank, and prints into two files, which may be one."""
    gc.freeze()  # what the server has imported is no garbage, which a run looks for
    for descriptor, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo",
    )  # fmt: skip


def _enter(namespace: str) -> None:
    """What `ip netns exec` does; for this thread, and for those that it will start."""
    libc = ctypes.CDLL(None)
    with open(f"/run/netns/{namespace}") as file:
        assert libc.setns(file.fileno(), _CLONE_NEWNET) == 0
    assert libc.unshare(_CLONE_NEWNS) == 0
    for mount in ("--make-rslave /", "-t sysfs sysfs /sys"):  # which shows the namespace's own
        subprocess.run(["mount", *mount.split()], check=True)


def _run(
    rank: int,
    world: int,
    port: int,
    words: list[str],
    log: str,
    package: str | None,
    directory: str | None,
    namespace: str | None,
    variables: dict[str, str],
) -> None:
    become(rank, world, port, log, log)
    os.environ.update(variables)
    if namespace is not None:
        _enter(namespace)
    if package is not None:
        for name in [name for name in sys.modules if name.partition(".")[0] == "dlora"]:
            del sys.modules[name]
        sys.path.insert(0, package)
    if directory is not None:
        os.chdir(directory)
        sys.path.insert(0, directory)
    sys.argv = words
    runpy.run_module(words[0], run_name="__main__", alter_sys=True)
