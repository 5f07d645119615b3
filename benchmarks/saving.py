"""What saving costs a run, how large a checkpoint is, and how soon a killed run trains again.

    python benchmarks/saving.py [--steps 60] [--rounds 3]

Stall: `configs/quickstart.yaml` over two ranks with `save_every: 10`. Seconds of rank 0's training
thread in `CheckpointManager.save` (a due save) and in `CheckpointManager.snapshot` (the copy of
every step in host memory), spread over the steps, in parts of the median step.
Restart: all processes of that run get SIGKILL, and the same command starts at once. Seconds to the
line of its next step, beside those of a start in an empty directory.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import yaml
from runs import ROOT, options
from safetensors import safe_open

EVERY = 10  # steps between two saves
POLL_SECONDS = 0.02
STATES = ("adapter", "optimizer", "scorer")


def configured(directory: Path, steps: int, save_every: int) -> Path:
    """The configuration of one run, as a file."""
    batches = {"global_batch_size": 16, "micro_batch_size": 8}
    changes = {"train": {"max_steps": steps, **batches}, "model": {"dtype": "bfloat16"}}
    config = options("quickstart.yaml", changes)
    config["output"] = {
        "dir": str(directory),
        "save_every": save_every,
        "eval_every": 0,
        "log_every": 1,
    }
    file = directory.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(config, sort_keys=False))
    return file


def launched(script: list[str]) -> subprocess.Popen[bytes]:
    """Two ranks."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*launcher, "--nproc-per-node=2", *script],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.DEVNULL,
    )


# -- stall -----------------------------------------------------------------------------------------


def worker(config: Path, into: Path) -> None:
    """One rank of the run whose saves are timed."""
    from dlora.runtime.exit_status import exit_with
    from dlora.train import main as train
    from dlora.training.checkpointing import CheckpointManager

    seconds: dict[str, list[float]] = {"save": [], "snapshot": []}

    def timed(name: str) -> None:
        method: Callable[..., Any] = getattr(CheckpointManager, name)

        def call(*args: Any) -> None:
            began = time.perf_counter()
            method(*args)
            seconds[name].append(time.perf_counter() - began)

        setattr(CheckpointManager, name, call)

    def run(_: list[str]) -> int:
        for name in seconds:
            timed(name)
        status = train(["--config", str(config)])
        if os.environ["RANK"] == "0":
            into.write_text(json.dumps(seconds))
        return status

    exit_with(run)


def stalls(root: Path, steps: int) -> dict[str, Any]:
    """Of one run of so many steps; and the size of what it saved."""
    directory, into = root / "stall", root / "stall.json"
    config = configured(directory, steps, EVERY)
    process = launched([__file__, "--worker", str(config), str(into)])
    if process.wait():
        raise SystemExit(process.returncode)
    taken = json.loads(into.read_text())
    lines = [json.loads(text) for text in (directory / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if line["step"]]
    step = statistics.median(line["step_seconds"] for line in lines)
    after = [line["step_seconds"] for line in lines if line["step"] % EVERY == 1][1:]
    [newest] = sorted((directory / "checkpoints").glob("step-*"))[-1:]
    return {
        "steps": steps,
        "step_seconds": step,
        "save_seconds": taken["save"],
        "keep_seconds": statistics.median(taken["snapshot"]),
        "save_of_a_step": sum(taken["save"]) / steps / step,
        "keep_of_a_step": statistics.median(taken["snapshot"]) / step,
        "step_after_a_save_over_step": statistics.median(after) / step,
        "checkpoint_bytes": sum(file.stat().st_size for file in newest.iterdir()),
        "state_bytes": sum(state_bytes(newest / f"{name}.safetensors") for name in STATES),
    }


def state_bytes(file: Path) -> int:
    """Of the tensors in a file."""
    if not file.exists():
        return 0
    with safe_open(file, framework="pt") as tensors:
        held = (tensors.get_tensor(name) for name in tensors.keys())  # noqa: SIM118
        return sum(tensor.nbytes for tensor in held)


# -- restart ---------------------------------------------------------------------------------------


def newest_step(directory: Path) -> int:
    """The last step in the metrics; a line that is being written does not count."""
    path = directory / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    whole = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    return max((line["step"] for line in whole), default=0)


def wait_for(directory: Path, step: int, process: subprocess.Popen[bytes]) -> None:
    while newest_step(directory) < step:
        if process.poll() is not None:
            raise SystemExit(f"the run in {directory} ended with {process.returncode}")
        time.sleep(POLL_SECONDS)


def kill(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL to the launcher and its ranks, which have sessions of their own."""
    for each in (agent := psutil.Process(process.pid), *agent.children(recursive=True)):
        each.kill()
    process.wait()


def restarts(root: Path, rounds: int) -> dict[str, list[float]]:
    """Seconds from a start to its first step, and from a kill to the next step."""
    seconds: dict[str, list[float]] = {"start": [], "restart": []}
    for number in range(rounds):
        directory = root / f"restart-{number}"
        command = ["-m", "dlora.train", "--config", str(configured(directory, 100, save_every=2))]
        began = time.perf_counter()
        process = launched(command)
        wait_for(directory, 1, process)
        seconds["start"].append(time.perf_counter() - began)
        wait_for(directory, 5, process)
        began = time.perf_counter()
        kill(process)
        process = launched(command)
        # Lines past the checkpoint go when the run takes the directory up; then they come again.
        while newest_step(directory) > 4 and process.poll() is None:
            time.sleep(POLL_SECONDS)
        wait_for(directory, 5, process)
        seconds["restart"].append(time.perf_counter() - began)
        kill(process)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--worker", nargs=2, type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, default=Path(__file__).with_suffix(".json"))
    args = parser.parse_args()
    if args.worker:
        worker(*args.worker)
        return
    with tempfile.TemporaryDirectory() as place:
        stall = stalls(Path(place), args.steps)
        seconds = restarts(Path(place), args.rounds)
    start, restart = (statistics.median(seconds[name]) for name in ("start", "restart"))
    size = stall["checkpoint_bytes"] / stall["state_bytes"]
    print(f"a step takes {stall['step_seconds']:.3f} s")
    print(f"saves every {EVERY} steps: {100 * stall['save_of_a_step']:.2f} % of a step")
    print(f"the snapshot of every step: {100 * stall['keep_of_a_step']:.2f} % of a step")
    print(f"the step after a save: {stall['step_after_a_save_over_step']:.3f} of a step")
    print(f"checkpoint: {stall['checkpoint_bytes'] / 1e6:.1f} MB, {size:.4f} of its tensors")
    print(f"first step after {start:.1f} s, after a kill {restart:.1f} s: {restart / start:.2f}")
    args.json.write_text(json.dumps({"stall": stall, "seconds": seconds}, indent=2) + "\n")


if __name__ == "__main__":
    main()
