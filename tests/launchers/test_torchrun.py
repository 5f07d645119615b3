"""launchers/torchrun.sh, run: two nodes that meet, and its exit status."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from programs import free_ports
from run_files import tiny_run
from sampling import full

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "launchers/torchrun.sh"
LIMIT_SECONDS, LAG_SECONDS = 240, 8
Node = subprocess.Popen[str]
# A rank that takes its time to end, as one does on a slow disk.
LATE = f"""
import atexit, os, time
if "RANK" in os.environ:
    atexit.register(time.sleep, {LAG_SECONDS})
"""


@pytest.fixture(scope="module")
def run_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run(tmp_path_factory.mktemp("scripts"), train__max_steps=3)


def environment(**more: Any) -> dict[str, str]:
    named = {key: str(value) for key, value in more.items()}
    return os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"} | named


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., list[Node]]]:
    """start(*words): two nodes, the rendezvous' host first; the other one's rank ends late."""
    started: list[Node] = []
    (tmp_path / "late").mkdir()
    (tmp_path / "late/sitecustomize.py").write_text(LATE)

    def both(*words: str) -> list[Node]:
        [port] = free_ports(1)
        for rank, late in enumerate(("", str(tmp_path / "late"))):
            with (tmp_path / f"log-{rank}").open("w") as log:
                here = {"HEAD": "localhost", "PORT": port, "NNODES": 2, "NODE_RANK": rank}
                if rank:  # the other counts its devices, for which it imports torch
                    here["NPROC_PER_NODE"] = 1
                started.append(
                    subprocess.Popen(
                        [SCRIPT, *words],
                        cwd=ROOT,
                        env=environment(**here, PYTHONPATH=late),
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        text=True,
                    )
                )
        return started

    yield both
    for node in started:
        node.terminate()
        node.wait(LIMIT_SECONDS)


def printed(place: Path) -> str:
    return "\n".join((place / f"log-{rank}").read_text() for rank in range(2))


def statuses(nodes: list[Node]) -> list[int]:
    return [node.wait(LIMIT_SECONDS) for node in nodes]


@pytest.mark.full  # 15 s; those of the next test have met as well
def test_two_nodes_meet(start: Callable[..., list[Node]], run_file: Path, tmp_path: Path) -> None:
    assert statuses(start("--config", str(run_file))) == [0, 0], printed(tmp_path)
    assert "2 rank(s)" in printed(tmp_path)


@pytest.mark.parametrize("stopped", [0, full(1)])  # 15 s each
def test_a_stop_of_either_node_is_the_status_of_both(
    start: Callable[..., list[Node]], tmp_path: Path, stopped: int
) -> None:
    """Also where the rendezvous' host is done first; a PyTorchJob starts 143 again, and 1 not."""
    run_file = tiny_run(tmp_path, train__max_steps=100_000, optimizer__schedule="constant")
    nodes, metrics = start("--config", str(run_file)), tmp_path / "run/metrics.jsonl"
    until = time.monotonic() + LIMIT_SECONDS
    while not (metrics.exists() and metrics.read_text().count("\n") >= 2):
        assert time.monotonic() < until and nodes[0].poll() is None, printed(tmp_path)
        time.sleep(0.1)
    nodes[stopped].send_signal(signal.SIGTERM)
    assert statuses(nodes) == [143, 143], printed(tmp_path)
    assert (tmp_path / "run/checkpoints/latest").is_file()
    assert "2 rank(s)" in printed(tmp_path)


def test_a_mistake_is_the_status_of_both(
    start: Callable[..., list[Node]], run_file: Path, tmp_path: Path
) -> None:
    words = ("--config", str(run_file), "--adapter.r", "0")
    assert statuses(start(*words)) == [2, 2], printed(tmp_path)
    assert printed(tmp_path).count("dlora: error: ") == 1


@pytest.mark.full  # 8 s; so are those of two nodes
def test_the_status_is_the_worker_s(run_file: Path) -> None:
    [port] = free_ports(1)
    command = [SCRIPT, "--config", str(run_file), "--adapter.r", "0"]
    made = subprocess.run(
        command,
        cwd=ROOT,
        env=environment(PORT=port),
        capture_output=True,
        text=True,
        timeout=LIMIT_SECONDS,
    )
    assert made.returncode == 2 and "adapter.r: must be >= 1" in made.stderr
