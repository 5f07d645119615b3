"""Two pods of the JobSet, as two agents on this machine: they meet, and end with one status.

Their variables are the manifest's, but for the address, which is a pod's, and one rank each.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from k8s_launch import environment
from k8s_manifests import ROOT, documents, pods
from k8s_restarts import STOPPED, WRONG
from tiny import command

LIMIT_SECONDS = 300


@pytest.fixture
def start() -> Iterator[Any]:
    """`start(words)`: both pods, the second one first."""
    started: list[subprocess.Popen[str]] = []

    def both(words: list[str]) -> list[subprocess.Popen[str]]:
        docs = documents("jobset")
        (pod,) = pods(docs)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            here = {"PET_MASTER_ADDR": "127.0.0.1", "PET_MASTER_PORT": str(free.getsockname()[1])}
        variables = os.environ | environment(pod, pod.containers[0], docs) | here
        variables |= {"PET_NPROC_PER_NODE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        line = [sys.executable, "-m", "dlora.launch", *words]
        streams: Any = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
        for index in ("1", "0"):
            variables |= {"PET_NODE_RANK": index}
            started.append(subprocess.Popen(line, env=variables, **streams))
        return started

    yield both
    for process in started:
        process.terminate()
        process.communicate(timeout=LIMIT_SECONDS)


def test_a_drained_pod_stops_both_with_a_checkpoint(
    start: Any, saved_models: Any, tmp_path: Path
) -> None:
    """Both statuses are that which the failure policies start again."""
    words = command(saved_models("llama"), tmp_path, train__max_steps=100000, output__log_every=1)
    drained, other = start(words)
    metrics, until = tmp_path / "run" / "metrics.jsonl", time.monotonic() + LIMIT_SECONDS
    while not (metrics.exists() and metrics.read_text()):
        assert time.monotonic() < until, "no step has finished"
        assert drained.poll() is other.poll() is None
        time.sleep(0.2)
    drained.send_signal(signal.SIGTERM)
    assert [p.wait(LIMIT_SECONDS) for p in (drained, other)] == [STOPPED, STOPPED]
    assert list((tmp_path / "run" / "checkpoints").glob("step-*/manifest.json"))


@pytest.mark.full  # 10 s; the agents of `test_torchrun.py` do the same
def test_a_wrong_configuration_ends_both_alike(
    start: Any, saved_models: Any, tmp_path: Path
) -> None:
    """Both statuses are that which ends the job."""
    both = start(command(saved_models("llama"), tmp_path, data__train="absent.jsonl"))
    assert [process.wait(LIMIT_SECONDS) for process in both] == [WRONG, WRONG]
    reported = "".join(process.stderr.read() for process in both)
    assert reported.count("dlora: error: ") == 1
