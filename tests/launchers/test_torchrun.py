"""launchers/torchrun.sh, run: two nodes that meet, and its exit status."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ray_cluster import free_ports
from run_files import tiny_run

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "launchers/torchrun.sh"


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
