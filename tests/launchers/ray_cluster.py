"""A Ray of two raylets on the loopback, with a token, that tests start, cut and stop."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import psutil
from programs import free_ports

ROOT = Path(__file__).parents[2]
RAY = [sys.executable, "-m", "ray.scripts.scripts"]
START_SECONDS, STOP_SECONDS, POLL_SECONDS = 240.0, 20.0, 0.3
STARTS = 3


class Cluster:
    """A head and one more node, one CPU each, so that two workers are on different raylets.

    Args:
        root: for logs, the token and Ray's session; a short path, as sockets lie in it.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.gcs, self.dashboard, self._client = free_ports(3)
        self.token = secrets.token_hex(16)
        token_file = root / "token"
        token_file.write_text(self.token)
        self.environment = os.environ | {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token_file),
            "RAY_ADDRESS": f"127.0.0.1:{self.gcs}",
            "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
            "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
            "RAY_health_check_period_ms": "500",  # a node that is gone is lost after 5 of them
            "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "5",  # for room, which is there or not
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_DISABLE_IMPORT_WARNING": "1",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        }
        self.nodes: list[subprocess.Popen[bytes]] = []

    @property
    def url(self) -> str:
        """Of the dashboard, where jobs are submitted."""
        return f"http://127.0.0.1:{self.dashboard}"

    def start(self, nodes: int) -> None:
        head = ["--head", f"--port={self.gcs}", f"--dashboard-port={self.dashboard}"]
        served = ["--include-dashboard=true", f"--ray-client-server-port={self._client}"]
        self._add([*head, *served], count=1)
        if nodes == 2:
            self.add_second()

    def add_second(self) -> None:
        """Where a second worker has room."""
        self._add([f"--address=127.0.0.1:{self.gcs}", "--node-ip-address=127.0.0.2"], count=2)

    def give_notice_to_second(self, seconds: int) -> None:
        """Tell Ray that the node goes in so many seconds, as a cloud's spot notice does."""
        [second] = (node["node_id"] for node in self._alive() if not node["is_head_node"])
        reason = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "a test"]
        address = ["--address", f"127.0.0.1:{self.gcs}", "--node-id", second]
        remaining = ["--deadline-remaining-seconds", str(seconds)]
        drained = self.python(*RAY[1:], "drain-node", *address, *reason, *remaining)
        assert drained.returncode == 0, drained.stderr

    def kill_second(self) -> None:
        """As if its machine had lost its power: SIGKILL to all that it runs."""
        end(self.nodes.pop())

    def stop(self) -> None:
        for node in reversed(self.nodes):
            left = below(node)  # what it runs and may leave behind
            node.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                node.wait(STOP_SECONDS)
            end(node, left)
        shutil.rmtree(self.root, ignore_errors=True)

    def run(self, module: str, *words: str, **changes: Any) -> subprocess.CompletedProcess[str]:
        """A program of dlora's as a user of this cluster starts it."""
        return self.python("-m", module, *words, **changes)

    def python(self, *words: str, **changes: Any) -> subprocess.CompletedProcess[str]:
        environment = {k: str(v) for k, v in (self.environment | changes).items() if v is not None}
        return subprocess.run(
            [sys.executable, *words],
            cwd=ROOT,
            env=environment,
            text=True,
            capture_output=True,
            timeout=480,
        )

    @contextlib.contextmanager
    def running(self, module: str, *words: str, log: Path) -> Iterator[subprocess.Popen[bytes]]:
        """The same, in the background and for the block; what it prints goes to a file."""
        with log.open("wb") as file:
            started = subprocess.Popen(
                [sys.executable, "-m", module, *words],
                cwd=ROOT,
                env=self.environment,
                stdout=file,
                stderr=subprocess.STDOUT,
            )
        try:
            yield started
        finally:
            started.kill()
            started.wait()

    def workers(self, node: int | None = None) -> list[psutil.Process]:
        """The processes of Ray Train's workers, of one node or of all."""
        nodes = self.nodes if node is None else [self.nodes[node]]
        started = [process for node in nodes for process in below(node)]
        return [process for process in started if "RayTrainWorker" in title(process)]

    def _add(self, options: Sequence[str], count: int) -> None:
        """Ray gives a node half a minute to come up, with no option for more, and on a busy machine
        some need longer; what is tested begins when the nodes stand."""
        for _ in range(STARTS):
            self._node(options)
            if self._stands(count):
                return
            end(self.nodes.pop())
        logs = [path.read_text() for path in sorted(self.root.glob("node-*.log"))]
        raise AssertionError("no node:\n" + "\n".join(logs))

    def _node(self, options: Sequence[str]) -> None:
        ports = free_ports(4)
        own = [
            f"--dashboard-agent-listen-port={ports[0]}",
            f"--dashboard-agent-grpc-port={ports[1]}",
            f"--metrics-export-port={ports[2]}",
            f"--runtime-env-agent-port={ports[3]}",
            f"--min-worker-port={20000 + 2000 * len(self.nodes)}",
            f"--max-worker-port={21999 + 2000 * len(self.nodes)}",
        ]
        temporary = [f"--temp-dir={self.root}"] if "--head" in options else []
        log = self.root / f"node-{len(self.nodes)}-{time.monotonic_ns()}.log"
        with log.open("wb") as file:
            command = [*RAY, "start", "--block", "--num-cpus=1", "--num-gpus=0"]
            self.nodes.append(
                subprocess.Popen(
                    [*command, "--object-store-memory=100000000", *options, *own, *temporary],
                    env={k: v for k, v in self.environment.items() if k != "RAY_ADDRESS"},
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            )

    def _stands(self, count: int) -> bool:
        """Whether so many nodes are there before the newest ends or its time does."""
        until = time.monotonic() + START_SECONDS
        while len(self._alive()) < count:
            if self.nodes[-1].poll() is not None or time.monotonic() > until:
                return False
            time.sleep(POLL_SECONDS)
        return True

    def _alive(self) -> list[dict[str, Any]]:
        """What the dashboard tells of each node; nothing while nobody listens yet."""
        authorization = {"Authorization": f"Bearer {self.token}"}
        with contextlib.suppress(OSError):
            request = Request(f"{self.url}/api/v0/nodes", headers=authorization)
            with urlopen(request, timeout=START_SECONDS) as answer:
                nodes = json.load(answer)["data"]["result"]["result"]
            return [node for node in nodes if node["state"] == "ALIVE"]
        return []


def below(node: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """All that a node runs; nothing where it has ended."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(node.pid).children(recursive=True)
    return []


def end(node: subprocess.Popen[bytes], left: Sequence[psutil.Process] = ()) -> None:
    """SIGKILL to a node, to all that it runs and to what it has left."""
    for process in (node, *below(node), *left):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    node.wait()


def title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


@contextlib.contextmanager
def cluster(nodes: int = 2) -> Iterator[Cluster]:
    """One that is gone with the block."""
    clusters = Clusters()
    try:
        yield clusters.whole(nodes)
    finally:
        clusters.stop()


class Clusters:
    """One cluster after another: a test that loses a node uses up its own."""

    def __init__(self) -> None:
        self._now: Cluster | None = None

    def whole(self, nodes: int = 2) -> Cluster:
        """One of which all nodes are there; to start it takes half a minute."""
        if self._now is None or len(self._now.nodes) < nodes:
            self.stop()
            self._now = Cluster(Path(tempfile.mkdtemp(prefix="ray-")))
            self._now.start(nodes)
        return self._now

    def stop(self) -> None:
        if self._now is not None:
            self._now.stop()
            self._now = None


def starts_in(log: str) -> int:
    """How often Ray Train has started workers; both raylets tell of the same logs here."""
    return len(set(re.findall(r"pid=(\d+)\) world_rank=0", log)))


def ended(job: subprocess.Popen[bytes], log: Path, limit: float = 400.0) -> int:
    """The exit status of a program; what it has printed, where it does not end."""
    try:
        return job.wait(limit)
    except subprocess.TimeoutExpired:
        raise AssertionError(f"still running after {limit:g} s: {log.read_text()}") from None
