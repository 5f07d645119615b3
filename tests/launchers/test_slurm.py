"""launchers/slurm.sbatch in a real Slurm of two nodes: it ends as its ranks do, and goes on."""

import contextlib
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from run_files import tiny_run
from slurm_cluster import Slurm, programs, slurm

LIMIT_SECONDS = 300
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"}

pytestmark = [
    pytest.mark.skipif(bool(programs()), reason=f"not installed: {', '.join(programs())}"),
    pytest.mark.skipif(os.getuid() != 0, reason="Slurm's daemons want to be root's"),
]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Slurm]:
    with slurm() as found:
        yield found


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    return tiny_run(tmp_path, train__max_steps=100_000, optimizer__schedule="constant")


def wait_for(condition: Callable[[], bool], log: Path, seconds: float = LIMIT_SECONDS) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, log.read_text() if log.exists() else "no log"
        time.sleep(0.1)


def ended(cluster: Slurm, job: str, log: Path) -> str:
    """A job's exit status, once it has one."""
    wait_for(lambda: cluster.job(job)["JobState"] in ENDED, log)
    return cluster.job(job)["ExitCode"]


def trains(run: Path) -> bool:
    metrics = run / "metrics.jsonl"
    return metrics.exists() and metrics.read_text().count("\n") >= 2


def test_two_nodes_make_one_run(cluster: Slurm, run_file: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    job = cluster.submit(log, "--config", str(run_file), "--train.max_steps", "3")
    assert ended(cluster, job, log) == "0:0", log.read_text()
    assert cluster.job(job)["NumNodes"] == "2" and "2 rank(s)" in log.read_text()
    assert (tmp_path / "run/adapter/adapter_model.safetensors").is_file()


@pytest.mark.full  # 15 s; `test_a_mistake_is_the_status_of_both` is the same script
def test_a_wrong_configuration_ends_it(cluster: Slurm, run_file: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    job = cluster.submit(log, "--config", str(run_file), "--adapter.r", "0")
    assert ended(cluster, job, log) == "2:0", log.read_text()
    assert "adapter.r: must be >= 1" in log.read_text()
    assert cluster.job(job)["Restarts"] == "0"


def test_a_cancelled_job_commits_first(cluster: Slurm, run_file: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    job = cluster.submit(log, "--config", str(run_file))
    wait_for(lambda: trains(tmp_path / "run"), log)
    cluster.ask("scancel", "--signal=TERM", job)
    assert ended(cluster, job, log) == "143:0", log.read_text()
    assert re.search(r"stopped by .* after step \d+", log.read_text())
    assert (tmp_path / "run/checkpoints/latest").is_file()


@pytest.mark.full  # 60 s: agents wait for each other, and Slurm for what it kills
def test_a_rank_that_hangs_ends_it(cluster: Slurm, run_file: Path, tmp_path: Path) -> None:
    """It is stopped, so that nobody hears of it; `test_torchrun.py` shows who is named."""
    log, run = tmp_path / "log", tmp_path / "run"
    words = ("--sharding.timeout_seconds", "20", "--output.save_every", "0")
    job = cluster.submit(log, "--config", str(run_file), *words)
    wait_for(lambda: trains(run), log)
    rank_1_of(job).suspend()
    wait_for(lambda: list((run / "checkpoints").glob("step-*")) != [], log, seconds=20 + 10)
    assert ended(cluster, job, log) == "1:0", log.read_text()
    assert re.search(r"rank 0: step \d+ is committed .*lost a peer: rank 1 on ", log.read_text())


def rank_1_of(job: str) -> psutil.Process:
    """The process of a job's second rank."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            variables = process.environ()
            ours = variables.get("RANK") == "1" and variables.get("SLURM_JOB_ID") == job
            if ours and "dlora.train" in process.cmdline():
                return process
    raise AssertionError("no such rank")


@pytest.mark.full  # Slurm lets two minutes pass before it starts a job again
@pytest.mark.timeout(600)
def test_short_of_time_it_is_queued_again(cluster: Slurm, run_file: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    job = cluster.submit(log, "--output.resume", "none", "--config", str(run_file))
    wait_for(lambda: trains(tmp_path / "run"), log)
    cluster.ask("scancel", "--batch", "--signal=USR1", job)
    wait_for(lambda: cluster.job(job)["Restarts"] == "1", log)
    stopped = re.search(r"stopped by .* after step (\d+)", log.read_text())
    assert stopped is not None, log.read_text()
    resumed = f"resuming after step {stopped[1]}"
    wait_for(lambda: resumed in log.read_text(), log, seconds=300)
    cluster.ask("scancel", "--signal=TERM", job)
    assert ended(cluster, job, log) == "143:0", log.read_text()
