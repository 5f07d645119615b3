"""What Ray costs a run: a step beside torchrun's, the way to the first step, and after a kill.

    python benchmarks/ray_overhead.py [--rounds 4] [--blocks 8]

`configs/quickstart.yaml` on one machine, over one rank, beside which Ray's own processes have a
core to themselves, and over two, with which they share both. For a step the run of `dlora launch`
and that of a Ray of one raylet are both alive, and by turns one of them makes seven steps while all
processes of the other are stopped, Ray's daemons too; the last six are timed, so that a machine
whose speed drifts is as fast for both. A job's first step is timed from `launchers.ray_submit` on,
and the next step from SIGKILL to one of its workers on, with a save every second step.
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
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
from runs import ROOT
from saving import configured, newest_step, wait_for

FIRST, STEPS = 3, 7  # steps until the first block, and of a block


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


@dataclass
class Run:
    """A run that is stopped and goes on.

    Attributes:
        roots: programs that it consists of, with all that they have started.
    """

    program: subprocess.Popen[bytes]
    directory: Path
    roots: list[psutil.Process]

    def signal(self, number: signal.Signals) -> None:
        for process in self._processes():
            with suppress(psutil.NoSuchProcess):
                process.send_signal(number)

    def daemons_seconds(self) -> float:
        """Of CPU that went to all but the ranks until now."""
        seconds = 0.0
        for process in self._processes():
            with suppress(psutil.NoSuchProcess):
                if "RayTrainWorker" not in " ".join(process.cmdline()):
                    times = process.cpu_times()
                    seconds += times.user + times.system
        return seconds

    def _processes(self) -> list[psutil.Process]:
        return [p for root in self.roots for p in (root, *root.children(recursive=True))]


def steps(
    root: Path, ranks: int, blocks: int, environment: dict[str, str], head: psutil.Process
) -> dict[str, list[float]]:
    """Seconds of a step in each block, by who started the ranks, and Ray's share of a core."""
    count = FIRST + STEPS * blocks + 1
    programs = {
        "torchrun": ["dlora", "launch", "--nproc-per-node", str(ranks)],
        "ray": ["launchers.ray_train", "--num-workers", str(ranks)],
    }
    runs: dict[str, Run] = {}
    for name, words in programs.items():
        directory = root / f"{name}-{ranks}"
        config = configured(directory, count, save_every=count)
        program = subprocess.Popen(
            [sys.executable, "-m", *words, "--config", str(config)],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        roots = [psutil.Process(program.pid), *([head] if name == "ray" else [])]
        runs[name] = Run(program, directory, roots)
        wait_for(directory, FIRST, program)
        runs[name].signal(signal.SIGSTOP)
    seconds: dict[str, list[float]] = {name: [] for name in [*programs, "daemons"]}
    for block in range(blocks):
        for name in sorted(runs, reverse=block % 2 == 0):  # neither is always the first
            run, done = runs[name], FIRST + STEPS * block
            run.signal(signal.SIGCONT)
            wait_for(run.directory, done + 1, run.program)
            began, before = time.perf_counter(), run.daemons_seconds()
            wait_for(run.directory, done + STEPS, run.program)
            taken = time.perf_counter() - began
            if name == "ray":
                seconds["daemons"].append((run.daemons_seconds() - before) / taken)
            run.signal(signal.SIGSTOP)
            seconds[name].append(taken / (STEPS - 1))
            print(f"{ranks} ranks, {name}: {seconds[name][-1]:.3f} s a step", flush=True)
    for name, run in runs.items():
        run.signal(signal.SIGCONT)
        if run.program.wait():
            raise SystemExit(f"the run of {name} ended with {run.program.returncode}")
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
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--json", type=Path, default=Path(__file__).with_suffix(".json"))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="r") as place:
        root = Path(place)
        with raylet(root / "ray") as (environment, url, head):
            found = ways(root, args.rounds, environment, url, head)
            by_ranks = {n: steps(root, n, args.blocks, environment, head) for n in (1, 2)}
    print(f"from submission to the first step {statistics.median(found['submit']):.1f} s")
    print(f"from a worker's death to the next step {statistics.median(found['kill']):.1f} s")
    for ranks, seconds in by_ranks.items():
        pairs = zip(seconds["ray"], seconds["torchrun"], strict=True)
        found[f"ratios_{ranks}"] = ratios = [ray / torchrun for ray, torchrun in pairs]
        medians = {name: statistics.median(taken) for name, taken in seconds.items()}
        print(
            f"a step of {ranks} ranks: {medians['torchrun']:.3f} s under torchrun, "
            f"{medians['ray']:.3f} s under Ray, {statistics.median(ratios):.3f} of it "
            f"({', '.join(f'{ratio:.3f}' for ratio in sorted(ratios))}), "
            f"whose own processes take {medians['daemons']:.1%} of a core"
        )
    args.json.write_text(json.dumps({"steps": by_ranks} | found, indent=2) + "\n")


if __name__ == "__main__":
    main()
