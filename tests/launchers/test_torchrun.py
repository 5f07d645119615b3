"""launchers/torchrun.sh, run: two nodes that meet, and its exit status.

Also as slurm.sbatch starts it, with what srun tells a node, and a node that hangs.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from programs import free_ports
from run_files import tiny_run
from sampling import full

from dlora.checkpoint import format as checkpoints

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "launchers/torchrun.sh"
LIMIT_SECONDS, LAG_SECONDS = 240, 8
SILENCE_SECONDS = 20  # after half of which a rank that gives no sign of life is lost
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
    """start(*words): two nodes, the rendezvous' host first; the other one's rank ends late.

    With `slurm` each finds its number in what srun sets, and no rank is late.
    """
    started: list[Node] = []
    (tmp_path / "late").mkdir()
    (tmp_path / "late/sitecustomize.py").write_text(LATE)

    def both(*words: str, slurm: bool = False) -> list[Node]:
        [port] = free_ports(1)
        for rank, late in enumerate(("", "" if slurm else str(tmp_path / "late"))):
            with (tmp_path / f"log-{rank}").open("w") as log:
                here: dict[str, Any] = {"HEAD": "localhost", "PORT": port, "NNODES": 2}
                here |= srun(rank) if slurm else {"NODE_RANK": rank}
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


def srun(node: int) -> dict[str, Any]:
    """The environment of a node's task: srun's own, and what slurm.sbatch adds for all."""
    ids = dict.fromkeys(("SLURM_NODEID", "SLURM_PROCID", "SLURM_TASK_PID"), node)
    job = {"SLURM_JOB_ID": 7, "SLURM_NNODES": 2, "SLURM_NTASKS": 2, "SLURM_LOCALID": 0}
    return ids | job | {"RUN_ID": "slurm-7-0"}


def ranks_of(node: Node) -> list[psutil.Process]:
    """The ranks that an agent has started."""
    below = psutil.Process(node.pid).children()
    return [process for process in below if "dlora.train" in process.cmdline()]


def printed(place: Path) -> str:
    return "\n".join((place / f"log-{rank}").read_text() for rank in range(2))


def wait_for(condition: Callable[[], bool], place: Path, seconds: float = LIMIT_SECONDS) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, printed(place)
        time.sleep(0.1)


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
    wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") >= 2, tmp_path)
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


@pytest.mark.parametrize(
    ("hangs", "said"),
    [
        ("the other's rank", f"rank 1 on {socket.gethostname()} gives no sign of life"),
        # 25 s: another start of two interpreters
        full("the first node", "the agent on .*, which serves the store, does not answer"),
    ],
    ids=["a rank", "a node"],
)
def test_under_slurm_a_rank_that_hangs_is_named(
    start: Callable[..., list[Node]], tmp_path: Path, hangs: str, said: str
) -> None:
    """It is stopped, so that nothing is raised: committed within 10 s of the limit, status 1."""
    settings = {"output__save_every": 0, "sharding__timeout_seconds": SILENCE_SECONDS}
    endless = {"train__max_steps": 100_000, "optimizer__schedule": "constant"}
    run_file, run = tiny_run(tmp_path, **settings | endless), tmp_path / "run"
    nodes, metrics = start("--config", str(run_file), slurm=True), run / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") >= 2, tmp_path)
    lost = 0 if hangs == "the first node" else 1
    stopped = ranks_of(nodes[lost])
    stopped += [psutil.Process(nodes[0].pid)] if lost == 0 else []
    for process in stopped:
        process.suspend()
    try:
        limit = SILENCE_SECONDS + 10
        wait_for(lambda: list((run / "checkpoints").glob("step-*")) != [], tmp_path, limit)
        wait_for(lambda: "lost a peer" in printed(tmp_path), tmp_path)
    finally:
        for process in stopped:  # as srun does once a node has failed (--kill-on-bad-exit)
            process.kill()
    assert nodes[1 - lost].wait(LIMIT_SECONDS) == 1, printed(tmp_path)
    step = max(json.loads(line)["step"] for line in metrics.read_text().splitlines())
    saved = run / "checkpoints" / f"step-{step:06d}"
    checkpoints.verify(saved)
    [line] = [line for line in printed(tmp_path).splitlines() if "is committed in" in line]
    committed = f"dlora: rank {1 - lost}: step {step} is committed in {saved}; the same command"
    assert re.search(rf"{committed} resumes from there \(lost a peer: {said}\)$", line), line


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
