"""Two nodes on one machine: two network namespaces joined by one link, each one torchrun node.

    namespace dlora-…-0                            namespace dlora-…-1
    ranks 0 … G−1   link0 10.99.0.1 ═══════ 10.99.0.2 link0   ranks G … 2G−1

    with two_nodes(Link(mbit=100, delay_ms=1), logs) as nodes:
        nodes.torchrun(["program.py", "--option"], ranks_per_node=2, limit=300)

Ranks of one node talk over its loopback, so that what `link0` counts is what crosses. A rank reads
it with `sent_bytes()`. Everything made here has a name of its own and is removed at the end, with
the processes in it. Needs root, `ip` and `tc`, and for a delay `/dev/net/tun`; `permitted()` asks.
"""

from __future__ import annotations

import itertools
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

INTERFACE = "link0"
ADDRESSES = ("10.99.0.1", "10.99.0.2")
PORT = 29500  # of the rendezvous; the namespaces are new, and so every port is free
BURST = "128kb"  # that tbf lets through at once: two of the kernel's largest segments
GRACE_SECONDS = 3.0  # in which the other node may end too, or an agent end its workers
SHOWN_CHARACTERS = 3000
FRAME_BYTES = 1514


@dataclass(frozen=True)
class Link:
    """What joins the nodes, the same in both directions.

    Attributes:
        mbit: rate in Mbit/s; None is as fast as the kernel copies.
        delay_ms: one way; a round trip takes at least twice that. It needs a rate.
    """

    mbit: int | None = None
    delay_ms: float = 0.0

    def __post_init__(self) -> None:
        if self.delay_ms and self.mbit is None:
            raise ValueError("a link with a delay needs a rate")

    def __str__(self) -> str:
        rate = "unshaped" if self.mbit is None else f"{self.mbit} Mbit/s"
        return f"{rate} + {self.delay_ms:g} ms" if self.delay_ms else rate


class NetworkError(RuntimeError):
    """The network could not be made, in the words of the command that failed."""


class NodeFailure(RuntimeError):  # noqa: N818
    """A run that failed on some node: how it ended, and what every rank said."""


def permitted(link: Link | None = None) -> str | None:
    """Why two nodes cannot be had on this machine; None where they can."""
    for tool in ("ip", "tc"):
        if shutil.which(tool) is None:
            return f"two nodes need the command {tool!r}"
    try:
        with two_nodes(link or Link(), Path(os.devnull)) as nodes:
            for node in (0, 1):
                _command(*nodes.inside(node), "true")
    except NetworkError as error:
        return f"network namespaces are not permitted here: {error}"
    return None


def sent_bytes(interface: str = INTERFACE) -> int:
    """What an interface of this namespace has sent so far, link headers included."""
    return int(Path(f"/sys/class/net/{interface}/statistics/tx_bytes").read_text())


def resent_bytes() -> int:
    """What TCP has sent a second time from this namespace, at most: whole frames of Ethernet.

    A kernel that waits for a processor repeats segments that had arrived, and an interface counts
    both.
    """
    lines = Path("/proc/net/snmp").read_text().splitlines()
    names, values = (line.split() for line in lines if line.startswith("Tcp:"))
    return FRAME_BYTES * int(values[names.index("RetransSegs")])


@contextmanager
def two_nodes(link: Link, logs: Path) -> Iterator[TwoNodes]:
    """The network, for as long as the context is open.

    Args:
        logs: directory for what agents and ranks print.

    Raises:
        NetworkError: the machine does not permit it.
    """
    name = f"dlora-{os.getpid()}-{secrets.token_hex(3)}"
    names = (f"{name}-0", f"{name}-1")
    with ExitStack() as made:
        for namespace in names:
            _command("ip", "netns", "add", namespace)
            made.callback(_remove, namespace)
            _ip(namespace, "link set lo up")
        if link.delay_ms:
            made.enter_context(_relayed(link, names))
        else:
            _joined(link, names)
        for namespace, address in zip(names, ADDRESSES, strict=True):
            # Without an address of its own making, the kernel has nothing to announce on the link.
            _ip(namespace, f"link set {INTERFACE} addrgenmode none")
            _ip(namespace, f"addr add {address}/24 dev {INTERFACE}")
            _ip(namespace, f"link set {INTERFACE} up")
        yield TwoNodes(names, logs)


class TwoNodes:
    """Runs programs on both nodes."""

    def __init__(self, namespaces: tuple[str, str], logs: Path) -> None:
        self.namespaces, self.logs = namespaces, logs
        self._runs = itertools.count(1)

    def inside(self, node: int) -> list[str]:
        """Words in front of a command that is to run on a node."""
        return ["ip", "netns", "exec", self.namespaces[node]]

    def torchrun(
        self, program: Sequence[str], *, limit: float, ranks_per_node: int = 1, **variables: str
    ) -> None:
        """Run a program, a script and its arguments, on every rank of both nodes.

        Args:
            limit: seconds, after which the run has failed.
            variables: environment beside this process's own.

        Raises:
            NodeFailure: a rank failed or the time was over; every process is ended by then.
        """
        logs = self.logs / f"run-{next(self._runs)}"
        environment = {
            **os.environ,
            "GLOO_SOCKET_IFNAME": INTERFACE,
            "OMP_NUM_THREADS": "1",
            **variables,
        }
        agents: list[subprocess.Popen[bytes]] = []
        try:
            for node in (0, 1):
                (logs / f"node-{node}").mkdir(parents=True)
                with open(logs / f"node-{node}.log", "wb") as log:
                    command = [*self.inside(node), *_agent(node, logs, ranks_per_node), *program]
                    agents.append(
                        subprocess.Popen(command, env=environment, stdout=log, stderr=log)
                    )
            statuses = _statuses(agents, limit)
        finally:
            self._end(agents)
        if statuses != [0, 0]:
            told = _report(statuses, limit, logs, ranks_per_node)
            raise NodeFailure(f"{' '.join(program)} failed on two nodes\n{told}")

    def _end(self, agents: list[subprocess.Popen[bytes]]) -> None:
        """End what still runs: agents are asked to end their workers, and then nobody is asked."""
        for agent in agents:
            agent.terminate()
        _statuses(agents, GRACE_SECONDS, patient=True)
        for namespace in self.namespaces:
            _kill_all(namespace)
        for agent in agents:
            agent.wait()


# The pieces --------------------------------------------------------------------------------------


def _agent(node: int, logs: Path, ranks_per_node: int) -> list[str]:
    """torchrun on one node. Host names do not resolve here, so it is told who hosts the store."""
    return [
        *(sys.executable, "-m", "torch.distributed.run"),
        *("--nnodes", "2", "--node-rank", str(node), "--nproc-per-node", str(ranks_per_node)),
        *("--rdzv-backend", "c10d", "--rdzv-endpoint", f"{ADDRESSES[0]}:{PORT}"),
        *("--rdzv-conf", f"is_host={str(node == 0).lower()}", "--local-addr", ADDRESSES[node]),
        *("--log-dir", str(logs / f"node-{node}"), "--redirects", "3"),
    ]


def _statuses(
    agents: list[subprocess.Popen[bytes]], limit: float, *, patient: bool = False
) -> list[int | None]:
    """Exit status by node, None where it did not end in time; one failure shortens the wait."""
    deadline = time.monotonic() + limit
    while True:
        statuses = [agent.poll() for agent in agents]
        if None not in statuses or time.monotonic() > deadline:
            return statuses
        if not patient and any(statuses):
            return _statuses(agents, GRACE_SECONDS, patient=True)
        time.sleep(0.05)


def _report(statuses: list[int | None], limit: float, logs: Path, ranks_per_node: int) -> str:
    lines = []
    for node, status in enumerate(statuses):
        how = f"did not end within {limit:g} s" if status is None else f"ended with status {status}"
        lines.append(f"--- node {node} {how}")
        printed = [logs / f"node-{node}.log", *sorted((logs / f"node-{node}").rglob("std*.log"))]
        for path in printed:
            said = path.read_text(errors="replace")[-SHOWN_CHARACTERS:].strip()
            local = path.parent.name  # torchrun names a directory after each local rank
            rank = f"rank {node * ranks_per_node + int(local)}" if local.isdigit() else "torchrun"
            lines += [f"--- node {node}, {rank}, {path.stem}", said] if said else []
    return "\n".join(lines)


def _joined(link: Link, names: tuple[str, str]) -> None:
    """A veth pair born inside the namespaces, with the rate of a token bucket at both ends."""
    _ip(names[0], f"link add {INTERFACE} type veth peer name {INTERFACE} netns {names[1]}")
    for namespace in names if link.mbit is not None else ():
        shape = f"tbf rate {link.mbit}mbit burst {BURST} latency 20ms"
        _command("tc", "-n", namespace, *f"qdisc add dev {INTERFACE} root {shape}".split())


@contextmanager
def _relayed(link: Link, names: tuple[str, str]) -> Iterator[None]:
    """A link with delay: `delay_link.py` as a process that lives as long as its standard input."""
    script = str(Path(__file__).with_name("delay_link.py"))
    options = [f"--mbit={link.mbit}", f"--delay-ms={link.delay_ms}", f"--interface={INTERFACE}"]
    relay = subprocess.Popen(
        [sys.executable, script, *names, *options],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert relay.stdout is not None
        assert relay.stderr is not None
        if not relay.stdout.readline():
            raise NetworkError(relay.stderr.read().strip().rpartition("\n")[2])
        yield
    finally:
        relay.communicate()


def _remove(namespace: str) -> None:
    """End what runs in a namespace and delete it; its interfaces go along."""
    _kill_all(namespace)
    _command("ip", "netns", "del", namespace)


def _kill_all(namespace: str) -> None:
    """Kill until nobody is left: a process may fork while it is looked for."""
    while pids := _command("ip", "netns", "pids", namespace).split():
        for pid in map(int, pids):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:  # ended meanwhile
                continue
        time.sleep(0.02)


def _ip(namespace: str, words: str) -> None:
    _command("ip", "-n", namespace, *words.split())


def _command(*words: str) -> str:
    done: Any = subprocess.run(words, capture_output=True, text=True)
    if done.returncode != 0:
        said = (done.stderr or done.stdout).strip() or f"status {done.returncode}"
        raise NetworkError(f"{' '.join(words)}: {said}")
    return done.stdout
