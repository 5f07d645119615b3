"""Held-out loss of AdaLoRA and of LoRA at an equal final budget, on the demo task.

    python benchmarks/adalora_quality.py [--seeds 0 1 2] [--runs runs/adalora_quality]

AdaLoRA is `configs/adalora.yaml` as it stands. LoRA is the same file with a plain adapter of
r = target_r in the place of AdaLoRA's: equal data, steps, lr and lora_alpha. Each run is a
`dlora.train` of its own over `--ranks` processes. A run that is in the JSON already is not made
again, and one that was stopped goes on from its last checkpoint.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parent.parent
METHODS = ("adalora", "lora")


def configuration(method: str, seed: int, directory: Path) -> dict[str, Any]:
    """The options of a run."""
    config = yaml.safe_load((ROOT / "configs/adalora.yaml").read_text())
    adapter = config["adapter"]
    if method == "lora":
        common = {name: adapter[name] for name in ("lora_alpha", "target_modules")}
        config["adapter"] = {"r": adapter["target_r"], **common}
    config["train"]["seed"] = seed
    config["output"]["dir"] = str(directory)
    return config


def train(method: str, seed: int, runs: Path, ranks: int) -> dict[str, Any]:
    """Make or finish a run; its row of the table."""
    directory = runs / f"{method}_seed{seed}"
    file = runs / f"{method}_seed{seed}.yaml"
    runs.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(configuration(method, seed, directory), sort_keys=False))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*launcher, f"--nproc-per-node={ranks}", "-m", "dlora.train", "--config", str(file)]
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    losses = [line["eval_loss"] for line in lines if line.get("eval_loss") is not None]
    last = lines[-1]
    return {
        "method": method,
        "seed": seed,
        "ranks": ranks,
        "steps": last["step"],
        "loss_before": losses[0],
        "loss": losses[-1],
        "train_loss": last["loss"],
    }


def report(rows: list[dict[str, Any]]) -> None:
    print(f"{'method':9}{'seeds':>7}{'held-out loss: mean':>22}{'of each':>30}")
    for method in METHODS:
        losses = [row["loss"] for row in rows if row["method"] == method]
        if losses:
            each = " ".join(f"{loss:.4f}" for loss in losses)
            print(f"{method:9}{len(losses):7}{statistics.mean(losses):22.4f}{each:>30}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs/adalora_quality")
    parser.add_argument("--json", type=Path, default=Path(__file__).with_suffix(".json"))
    args = parser.parse_args()
    rows = json.loads(args.json.read_text()) if args.json.exists() else []
    made = {(row["method"], row["seed"]) for row in rows}
    for seed in args.seeds:
        for method in METHODS:
            if (method, seed) not in made:
                rows.append(train(method, seed, args.runs.resolve(), args.ranks))
                args.json.write_text(json.dumps(rows, indent=2) + "\n")
    report(rows)


if __name__ == "__main__":
    main()
