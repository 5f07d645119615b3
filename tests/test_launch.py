"""`dlora launch`: what its agent would trip over is one line and status 2, before any process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dlora.errors import UsageError
from dlora.launch import agent_options, main, split

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--nproc-per-node x --config run.yaml", "^--nproc-per-node x: Unsupported"),
        ("--nproc-per-node 0 --config run.yaml", "^--nproc-per-node 0: must be at least 1"),
        ("--nnodes two --config run.yaml", "^--nnodes two: "),
        ("--nnodes 1:2:3 --config run.yaml", "^--nnodes 1:2:3: "),
        ("--nproc-per-nod 2 --bogus --config run.yaml", "bogus"),
        ("--nproc-per-node", "expected one argument"),
        ("--nproc-per-node 2 run.yaml", "^run.yaml: unexpected argument; .* --config FILE"),
        ("--nproc-per-node 2 run.yaml --check", "^run.yaml: unexpected argument"),
    ],
)
def test_a_mistake_is_one_line(words: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        main(words.split())


def test_what_is_right_is_torchrun_s_own_reading() -> None:
    words = "--nnodes 1:2 --nproc-per-node 3 --rdzv-backend c10d --config run.yaml --adapter.r 8"
    args = agent_options(*split(words.split()))
    assert (args.nnodes, args.nproc_per_node, args.rdzv_backend) == ("1:2", "3", "c10d")
    assert args.module and args.training_script == "dlora.train"
    assert args.training_script_args == ["--config", "run.yaml", "--adapter.r", "8"]


def test_the_command_says_so() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "dlora.launch", "--nproc-per-node", "x", "--config", "run.yaml"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "dlora: error: --nproc-per-node x: Unsupported nproc_per_node value: x"
    ]
