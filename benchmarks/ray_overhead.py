"""What Ray costs a run: a step beside torchrun's, the way to the first step, and after a kill.

    python benchmarks/ray_overhead.py [--rounds 4] [--steps 12]

`configs/quickstart.yaml` on one machine, under `dlora launch` and under a Ray of one raylet by
turns, which begins changing from round to round: over one rank, beside which Ray's daemons and
actors have a core to themselves, and over two, with which they share both. A step is the time
between the metrics' lines from the third on, so with all that happens between two steps; the ratio
is that of each round. A job's first step is timed from `launchers.ray_submit` on, and the next step
from SIGKILL to one of its workers on, with a save every second step.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
from runs import ROOT
from saving import configured, newest_step, wait_for

POLL_SECONDS = 0.02


@contextmanager
def raylet(root: Path) -> Iterator[tuple[dict[str, str], str, psutil.Process]]:
    """(environment of programs that use it, the dashboard's URL, its process)."""
    gcs, dashboard = free_port(), free_port()
    environment = os.environ | {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(16),
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    head = subprocess.Popen(
        [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block"]
        + [f"--port={gcs}", f"--dashboard-port={dashboard}", "--num-cpus=2", "--num-gpus=0"]
        + [f"--temp-dir={root}"],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        while not listens(dashboard):
            if head.poll() is not None:
                raise SystemExit(f"ray start ended with {head.returncode}")
            time.sleep(0.2)
        url = f"http://127.0.0.1:{dashboard}"
        yield environment | {"RAY_ADDRESS": f"127.0.0.1:{gcs}"}, url, psutil.Process(head.pid)
    finally:
        left = psutil.Process(head.pid).children(recursive=True)
        head.send_signal(signal.SIGTERM)
        head.wait()
        for process in (process for process in left if process.is_running()):
            process.kill()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def step_seconds(command: list[str], directory: Path, count: int, env: dict[str, str]) -> float:
    """Of a run of so many steps, without its first two and its closing save."""
    quiet = subprocess.DEVNULL
    run = subprocess.Popen(command, cwd=ROOT, env=env, stdout=quiet, stderr=quiet)
    wait_for(directory, 2, run)
    began = time.perf_counter()
    wait_for(directory, count, run)
    seconds = (time.perf_counter() - began) / (count - 2)
    if run.wait():
        raise SystemExit(f"the run in {directory} ended with {run.returncode}")
    return seconds


def steps(
    root: Path, ranks: int, rounds: int, count: int, environment: dict[str, str]
) -> dict[str, list[float]]:
    """Seconds of a step, by who started the ranks."""
    programs = {
        "torchrun": ["dlora", "launch", "--nproc-per-node", str(ranks)],
        "ray": ["launchers.ray_train", "--num-workers", str(ranks)],
    }
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for number in range(rounds):
        for name in sorted(programs, reverse=number % 2 == 0):  # neither is always the warmer one
            directory = root / f"{name}-{ranks}-{number}"
            config = configured(directory, count, save_every=count)
            command = [sys.executable, "-m", *programs[name], "--config", str(config)]
            seconds[name].append(step_seconds(command, directory, count, environment))
            print(f"{ranks} ranks, {name}: {seconds[name][-1]:.3f} s a step", flush=True)
    return seconds


def ways(
    root: Path, rounds: int, environment: dict[str, str], url: str, head: psutil.Process
) -> dict[str, list[float]]:
    """Seconds to the first step of a job, and from a worker's death to the next step."""
    seconds: dict[str, list[float]] = {"submit": [], "kill": []}
    for number in range(rounds):
        directory = root / f"job-{number}"
        packed = root / f"packed-{number}"
        packed.mkdir()
        config = configured(directory, 8, save_every=2).rename(packed / "run.yaml")
        text = config.read_text().replace("models/", f"{ROOT}/models/")
        config.write_text(text)
        command = [sys.executable, "-m", "launchers.ray_submit", "--address", url]
        command += ["--working-dir", str(packed), "--config", str(config), "--num-workers", "2"]
        began = time.perf_counter()
        job = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        wait_for(directory, 1, job)
        seconds["submit"].append(time.perf_counter() - began)
        wait_for(directory, 3, job)
        began = time.perf_counter()
        before = newest_step(directory)
        worker_of(head).kill()
        wait_for(directory, before + 1, job)
        seconds["kill"].append(time.perf_counter() - began)
        if job.wait():
            raise SystemExit(f"the job in {directory} ended with {job.returncode}")
    return seconds


def worker_of(head: psutil.Process) -> psutil.Process:
    """One of Ray Train's workers below a raylet."""
    below = head.children(recursive=True)
    return [process for process in below if "RayTrainWorker" in " ".join(process.cmdline())][-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--json", type=Path, default=Path(__file__).with_suffix(".json"))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="r") as place:
        root = Path(place)
        with raylet(root / "ray") as (environment, url, head):
            found = ways(root, args.rounds, environment, url, head)
            by_ranks = {n: steps(root, n, args.rounds, args.steps, environment) for n in (1, 2)}
    print(f"from submission to the first step {statistics.median(found['submit']):.1f} s")
    print(f"from a worker's death to the next step {statistics.median(found['kill']):.1f} s")
    for ranks, seconds in by_ranks.items():
        pairs = zip(seconds["ray"], seconds["torchrun"], strict=True)
        found[f"ratios_{ranks}"] = ratios = [ray / torchrun for ray, torchrun in pairs]
        medians = {name: statistics.median(taken) for name, taken in seconds.items()}
        print(
            f"a step of {ranks} ranks: {medians['torchrun']:.3f} s under torchrun, "
            f"{medians['ray']:.3f} s under Ray, {statistics.median(ratios):.3f} of it "
            f"({', '.join(f'{ratio:.3f}' for ratio in sorted(ratios))})"
        )
    args.json.write_text(json.dumps({"steps": by_ranks} | found, indent=2) + "\n")


if __name__ == "__main__":
    main()
