"""What the papers claim of updates, on the demo model: short runs, and what `dlora analyse` finds.

    python benchmarks/analyse.py [--runs runs/analyse] [--json FILE]

Five LoRAs (r = 2, 8, 32, the latter two with a second seed) and one AdaLoRA on the demo task of
`configs/quickstart.yaml`, 48 steps of 8 sequences each, one process, at one learning rate and one
scale s = 2. A run that is there is not made again. The questions: does a small r suffice, does ΔW
amplify what W0 does not emphasise, do two trainings find the same directions, which layers get
rank.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from statistics import mean
from typing import Any

from runs import ROOT, held_out, options, train

from dlora.analysis.command import RESULT
from dlora.analysis.command import main as analyse

STEPS, BATCH, LR, HELD_OUT = 48, 8, 2e-3, 128
ADALORA = {"method": "adalora", "init_r": 12, "target_r": 8, "tinit": 8, "tfinal": 16}
RUNS: dict[str, tuple[dict[str, Any], int]] = {
    f"lora_r{r}_seed{seed}": ({"r": r, "lora_alpha": 2 * r}, seed)
    for r, seed in ((2, 0), (8, 0), (32, 0), (8, 1), (32, 1))
} | {"adalora_seed0": ({**ADALORA, "lora_alpha": 24}, 0)}
PAIRS = (
    ("lora_r8_seed0", "lora_r32_seed0"),
    ("lora_r8_seed0", "lora_r8_seed1"),
    ("lora_r32_seed0", "lora_r32_seed1"),
)


def finished(name: str, runs: Path) -> tuple[float, float]:
    """Make or finish a run; the held-out loss before and after."""
    adapter, seed = RUNS[name]
    config = options("quickstart.yaml", {})
    config["adapter"] = {"target_modules": "all-linear", **adapter}
    config["optimizer"] |= {"lr": LR}
    config["data"]["max_eval_samples"] = HELD_OUT
    config["train"] = {
        "max_steps": STEPS,
        "global_batch_size": BATCH,
        "micro_batch_size": BATCH // 2,
        "seed": seed,
    }
    config["sharding"]["base"] = "none"
    directory = runs / name
    config["output"] = {"dir": str(directory), "eval_every": STEPS, "save_every": STEPS // 2}
    metrics = directory / "metrics.jsonl"
    if (directory / "adapter").is_dir():
        return held_out([json.loads(line) for line in metrics.read_text().splitlines()])
    return held_out(train(config, ranks=1))


def found(runs: Path, name: str, against: str | None = None) -> dict[str, Any]:
    """`analysis.json` of a run's adapter."""
    with tempfile.TemporaryDirectory() as made:
        words = ["--adapter", str(runs / name / "adapter"), "--to", f"{made}/of"]
        analyse([*words, *(["--against", str(runs / against / "adapter")] if against else [])])
        result: dict[str, Any] = json.loads((Path(made) / "of" / RESULT).read_text())
        return result


def row(name: str, runs: Path) -> dict[str, Any]:
    """The figures of a run."""
    before, after = finished(name, runs)
    result = found(runs, name)
    spectra = [matrix["sigma"] for matrix in result["matrices"].values() if matrix["sigma"]]
    first = {
        k: mean(sum(s**2 for s in sigma[:k]) / sum(s**2 for s in sigma) for sigma in spectra)
        for k in (1, 2, 8)
    }
    kept = result["adalora"]
    return {
        "loss_before": before,
        "loss": after,
        **result["all"],
        "first": first,
        "kinds": result["kinds"],
        "adalora": kept and {key: value for key, value in kept.items() if key != "ranks"},
        "pruned": kept and sum(1 for rank in kept["ranks"].values() if not rank),
    }


def report(rows: dict[str, Any], pairs: dict[str, Any]) -> None:
    print("| run | held-out loss | dW / W0 | eff. rank | r of 90 % | energy in 1, 2, 8 |", end="")
    print(" amplified | on dW's | on W0's largest | random |\n" + "|---" * 10 + "|")
    for name, own in rows.items():
        first = ", ".join(f"{own['first'][k]:.0%}" for k in own["first"])
        print(
            f"| {name} | {own['loss']:.3f} | {own['ratio']:.5f} | {own['effective_rank']:.2f} | "
            f"{own['rank_90']:.2f} | {first} | {own['amplification']:.3f} | "
            f"{own['projection']:.2f} | {own['top']:.1f} | {own['random']:.2f} |"
        )
    print("\n| adapters | side | first directions | all | random | cosine |\n" + "|---" * 6 + "|")
    for name, own in pairs.items():
        for side in ("input", "output"):
            phi = own[side]
            print(
                f"| {name} | {side} | {phi['first']:.3f} | {phi['all']:.3f} | "
                f"{phi['random']:.4f} | {own['cosine']:.3f} |"
            )
    print("\n| kind | " + " | ".join(rows) + " |\n" + "|---" * (len(rows) + 1) + "|")
    for kind in next(iter(rows.values()))["kinds"]:
        cells = []
        for own in rows.values():
            part = own["kinds"][kind]
            rank = f", r {own['adalora']['kinds'][kind]:.2f}" if own["adalora"] else ""
            cells.append(f"{part['energy']:.1%}, {part['amplification']:.2f}{rank}")
        print(f"| {kind} | " + " | ".join(cells) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=Path, default=ROOT / "runs/analyse")
    parser.add_argument("--json", type=Path, default=Path(__file__).with_suffix(".json"))
    args = parser.parse_args()
    runs = args.runs.resolve()
    rows = {name: row(name, runs) for name in RUNS}
    pairs = {}
    for one, other in PAIRS:
        pairs[f"{one} / {other}"] = found(runs, one, other)["against"]["all"]
    args.json.write_text(json.dumps({"rows": rows, "pairs": pairs}, indent=1) + "\n")
    report(rows, pairs)


if __name__ == "__main__":
    main()
