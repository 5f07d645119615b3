"""The shell scripts, run: two nodes that meet, and a batch script whose Slurm is two programs."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from ray_cluster import free_ports
from run_files import tiny_run

ROOT = Path(__file__).parents[2]
SCRIPT, BATCH = ROOT / "launchers/torchrun.sh", ROOT / "launchers/slurm.sbatch"
SRUN = """#!/usr/bin/env bash
# srun on two nodes, both here
set -u
echo "srun $*" >> "$ASKED"
shift
SLURM_NODEID=1 "$@" & other=$!
SLURM_NODEID=0 "$@" & one=$!
trap 'kill -TERM $one $other' TERM
wait $one; status=$?
while kill -0 $one 2>/dev/null; do wait $one; status=$?; done
wait $other
exit $status
"""
SCONTROL = """#!/usr/bin/env bash
echo "scontrol $*" >> "$ASKED"
if [[ $1 == show ]]; then printf 'localhost\\nother\\n'; fi
"""


@pytest.fixture(scope="module")
def run_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run(tmp_path_factory.mktemp("scripts"), train__max_steps=3)


def environment(**more: Any) -> dict[str, str]:
    named = {key: str(value) for key, value in more.items()}
    return os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"} | named


def test_two_nodes_meet(run_file: Path) -> None:
    [port] = free_ports(1)
    nodes = [
        subprocess.Popen(
            [SCRIPT, "--config", str(run_file)],
            cwd=ROOT,
            env=environment(HEAD="localhost", PORT=port, NNODES=2, NODE_RANK=rank),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    printed = [node.communicate(timeout=120)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], printed
    assert "2 rank(s)" in "".join(printed)


def test_the_status_is_the_worker_s(run_file: Path) -> None:
    [port] = free_ports(1)
    command = [SCRIPT, "--config", str(run_file), "--adapter.r", "0"]
    made = subprocess.run(
        command, cwd=ROOT, env=environment(PORT=port), capture_output=True, text=True, timeout=60
    )
    assert made.returncode == 2 and "adapter.r: must be >= 1" in made.stderr


@pytest.mark.parametrize("number", [None, signal.SIGUSR1, signal.SIGTERM])
def test_the_batch_script(run_file: Path, tmp_path: Path, number: signal.Signals | None) -> None:
    """Its nodes meet; short of time they commit and the job is queued again, and only then."""
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    asked, run, log = tmp_path / "asked", tmp_path / "run", tmp_path / "log"
    steps = "3" if number is None else "100000"
    with log.open("wb") as file:
        batch = subprocess.Popen(
            [
                BATCH,
                "--config",
                str(run_file),
                "--output.dir",
                str(run),
                "--train.max_steps",
                steps,
            ],
            cwd=tmp_path,
            env=environment(
                PATH=f"{tmp_path}:{os.environ['PATH']}",
                ASKED=asked,
                SLURM_SUBMIT_DIR=ROOT,
                SLURM_JOB_NODELIST="localhost,other",
                SLURM_NNODES=2,
                SLURM_JOB_ID=os.getpid(),
            ),
            stdout=file,
            stderr=file,
        )
    if number is not None:
        until = time.monotonic() + 120
        while not (run / "metrics.jsonl").exists() or not (run / "metrics.jsonl").read_text():
            assert time.monotonic() < until and batch.poll() is None, log.read_text()
            time.sleep(0.05)
        batch.send_signal(number)
    status = batch.wait(timeout=120)
    assert status == (0 if number is None else 143), log.read_text()
    made = [run / "adapter" if number is None else run / "checkpoints/latest"]
    assert all(path.exists() for path in made)
    requeued = f"scontrol requeue {os.getpid()}" in asked.read_text()
    assert requeued == (number == signal.SIGUSR1)
    assert "srun --kill-on-bad-exit=1 launchers/torchrun.sh --config" in asked.read_text()
