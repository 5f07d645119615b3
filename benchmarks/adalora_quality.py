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
import statistics
from pathlib import Path
from typing import Any

from runs import ROOT, held_out, options, rows_of, train

METHODS = ("adalora", "lora")


def run(method: str, seed: int, runs: Path, ranks: int) -> dict[str, Any]:
    """Make or finish a run; its row of the table."""
    changes = {"train": {"seed": seed}, "output": {"dir": str(runs / f"{method}_seed{seed}")}}
    config = options("adalora.yaml", changes)
    adapter = config["adapter"]
    if method == "lora":
        common = {name: adapter[name] for name in ("lora_alpha", "target_modules")}
        config["adapter"] = {"r": adapter["target_r"], **common}
    lines = train(config, ranks)
    before, after = held_out(lines)
    return {
        "method": method,
        "seed": seed,
        "ranks": ranks,
        "steps": lines[-1]["step"],
        "loss_before": before,
        "loss": after,
        "train_loss": lines[-1]["loss"],
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
    rows = rows_of(args.json)
    made = {(row["method"], row["seed"]) for row in rows}
    for seed in args.seeds:
        for method in METHODS:
            if (method, seed) not in made:
                rows.append(run(method, seed, args.runs.resolve(), args.ranks))
                args.json.write_text(json.dumps(rows, indent=2) + "\n")
    report(rows)


if __name__ == "__main__":
    main()
