"""How long `dlora report` takes on the log of a long run, and how large its page is.

    python benchmarks/report.py [--steps 10000] [--rounds 5]

The log has a line for each step with the figures of an AdaLoRA run and those of preferences, an
evaluation with forgetting each 50th step, masks of 210 matrices each 100th, 8 samples, and what a
run records of its starts. The command is a process of its own, from its start to its end.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from dlora.metrics.events import add_event
from dlora.report.page import page_of
from dlora.report.run_files import find_runs

ROOT = Path(__file__).resolve().parents[1]
KINDS = [f"self_attn.{k}_proj" for k in "qkvo"] + [f"mlp.{k}_proj" for k in ("gate", "up", "down")]
LAYERS = 30


def line(step: int, steps: int, draw: random.Random) -> dict[str, Any]:
    """A line of the log."""
    done = step / steps
    tokens, seconds = draw.randint(900, 1100), draw.uniform(0.9, 1.1)
    all_tokens = tokens + draw.randint(1000, 1400)
    found = {
        "step": step,
        "loss": 0.8 + 2.4 * math.exp(-6 * done) + draw.gauss(0, 0.12),
        "grad_norm": abs(draw.gauss(1, 0.2)),
        "lr": 1e-4 * (1 + math.cos(math.pi * done)),
        "tokens": tokens,
        "all_tokens": all_tokens,
        "padding": draw.uniform(0.02, 0.2),
        "step_seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "all_tokens_per_second": all_tokens / seconds,
        "all_tokens_per_second_per_device": all_tokens / seconds / 2,
        "mfu": draw.uniform(0.3, 0.4),
        "peak_memory_bytes": 1_400_000_000 + step,
        "wire_bytes": 282_500_000,
        "batch_hash": f"{draw.getrandbits(256):064x}",
        "orth_loss": 1e-3 * math.exp(-done),
        "budget": 2520 - round(840 * done),
        "kept_ranks": 2520 - round(840 * done),
        "rewards_chosen": done + draw.gauss(0, 0.1),
        "rewards_rejected": -done + draw.gauss(0, 0.1),
        "margin": 2 * done + draw.gauss(0, 0.1),
        "accuracy": min(1.0, 0.5 + 0.5 * done),
        "kl": 0.1 * done,
    }
    if step % 50 == 0:
        found |= {"eval_loss": 0.9 + 2.3 * math.exp(-5 * done), "forget_kl": 0.02 * done}
        found |= {"forget_nll": 2.5 + 0.1 * done, "forget_agreement": 1 - 0.1 * done}
    return found


def write(run: Path, steps: int) -> None:
    """The directory of such a run."""
    draw = random.Random(0)
    run.mkdir()
    with open(run / "metrics.jsonl", "w") as file:
        for step in range(1, steps + 1):
            file.write(json.dumps(line(step, steps, draw)) + "\n")
    ranks = {
        step: {
            f"model.layers.{i}.{kind}": max(0, round(12 - 8 * step / steps * draw.random()))
            for i in range(LAYERS)
            for kind in KINDS
        }
        for step in range(100, steps + 1, 100)
    }
    (run / "ranks.json").write_text(json.dumps(ranks))
    (run / "config.yaml").write_text(
        f"model: {{path: base}}\nadapter: {{method: adalora}}\ntrain: {{max_steps: {steps}}}\n"
    )
    planned = {"peak": 1.6e9, "base": 168.3e6, "replica": 78e6, "wire": 282.5e6}
    add_event(run, "start", 0, {"steps": steps, "ranks": 2, "planned": planned})
    for when in ("before training", "after training"):
        for number in range(8):
            asked = {
                "prompt": f"def f{number}(x):",
                "wanted": "a sentence",
                "answer": "words " * 40,
            }
            add_event(run, "sample", 0, {"when": when} | asked)
    add_event(run, "finished", steps, {"measured": planned})


def timed(run: Path, page: Path) -> tuple[float, float]:
    """(seconds, seconds of processors) of the command."""
    command = [sys.executable, "-m", "dlora", "report", str(run), "--to", str(page)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
    seconds, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return seconds, used


def main() -> None:
    """Measure, print, write `report.json`."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run, page = Path(folder) / "run", Path(folder) / "page.html"
        write(run, args.steps)
        times = [timed(run, page) for _ in range(args.rounds)]
        charts = page_of(find_runs([str(run)])).count(b'<figure class="chart"')
        found = {
            "steps": args.steps,
            "figures": len(line(50, args.steps, random.Random(0))) - 2,
            "charts": charts,
            "log_bytes": (run / "metrics.jsonl").stat().st_size,
            "page_bytes": page.stat().st_size,
            "seconds": [seconds for seconds, _ in times],
            "processor_seconds": [used for _, used in times],
        }
    for name, value in found.items():
        words = f"median {statistics.median(value):.2f}" if isinstance(value, list) else value
        print(f"{name:<20}{words}")
    Path(__file__).with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
