"""Held-out loss, size and memory of every method on the demo task, beside full fine-tuning.

    python benchmarks/methods.py [--seeds 0 1 2] [--methods lora dora …] [--runs runs/methods]

Each run is a `dlora.train` of its own: `configs/quickstart.yaml` for 60 steps of 8 sequences, r=16,
lora_alpha=32, with what `METHODS` changes. The learning rate is 2e-3 where a method starts like
LoRA, and lower where it steps larger matrices or starts from large factors; no method's has been
searched for. Full fine-tuning trains every block in float32 masters, in one process. A run that is
in the JSON is not made again, and one that was stopped goes on from its checkpoint. Step times are
compared in one process (`method_steps.py`), as runs beside each other cannot be.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from pathlib import Path
from typing import Any

from runs import ROOT, held_out, options, rows_of, train

from dlora.io.safetensors import stored_tensors

BLOCKS = 30  # of the demo model
LR, HELD_OUT = 2e-3, 128
LOW_LR = {"lr": LR / 4}
METHODS: dict[str, dict[str, dict[str, Any]]] = {
    "lora": {},
    "rslora": {"adapter": {"use_rslora": True}},
    "lora+": {"optimizer": {"loraplus_lr_ratio": 16.0, **LOW_LR}},
    "gaussian": {"adapter": {"init_lora_weights": "gaussian"}},
    "orthogonal": {"adapter": {"init_lora_weights": "orthogonal"}},
    "dora": {"adapter": {"use_dora": True}},
    "pissa": {"adapter": {"init_lora_weights": "pissa"}, "optimizer": LOW_LR},
    "milora": {"adapter": {"init_lora_weights": "milora"}},
    "lora_ga": {"adapter": {"init_lora_weights": "lora_ga"}, "optimizer": LOW_LR},
    "lora_pro": {"optimizer": {"name": "lora_pro"}},
    "adalora": {
        "adapter": {"method": "adalora", "init_r": 24, "target_r": 16, "tinit": 10, "tfinal": 20}
    },
    "flora": {"adapter": {"method": "flora"}},
    "qlora nf4": {"model": {"quantization": "nf4"}},
    "qdora nf4": {"model": {"quantization": "nf4"}, "adapter": {"use_dora": True}},
    "adamw8bit": {"optimizer": {"name": "adamw8bit"}},
    "full": {
        "adapter": {"modules_to_save": [f"layers.{i}" for i in range(BLOCKS)]},
        "optimizer": {"lr": 1e-4},
    },
}
STEPS, BATCH = 60, 8


def run(method: str, seed: int, runs: Path) -> dict[str, Any]:
    """Make or finish a run; its row of the table."""
    directory = runs / f"{method.replace(' ', '_')}_seed{seed}"
    config = options("quickstart.yaml", METHODS[method])
    config["model"]["dtype"] = "bfloat16"
    config["optimizer"] |= {"lr": LR} | METHODS[method].get("optimizer", {})
    config["data"]["max_eval_samples"] = HELD_OUT
    if config["adapter"].get("method") == "adalora":
        del config["adapter"]["r"]
    config["train"] = {
        "max_steps": STEPS,
        "global_batch_size": BATCH,
        "micro_batch_size": BATCH // 2,
        "seed": seed,
    }
    config["sharding"]["base"] = "none"  # the result is that of any placement, and comes sooner
    config["output"] = {"dir": str(directory), "eval_every": STEPS, "save_every": STEPS // 2}
    lines = train(config, ranks=1 if method == "full" else 2)
    before, after = held_out(lines)
    adapter = directory / "adapter/adapter_model.safetensors"
    return {
        "method": method,
        "seed": seed,
        "steps": lines[-1]["step"],
        "lr": config["optimizer"]["lr"],
        "loss_before": before,
        "loss": after,
        "trained": trained(directory / "checkpoints" / f"step-{STEPS:06d}/adapter.safetensors"),
        "peak_mb": max(line["peak_memory_bytes"] for line in lines if line["step"]) / 1e6,
        "adapter_mb": adapter.stat().st_size / 1e6,
    }


def trained(file: Path) -> int:
    """Numbers that are trained; what is frozen of an adapter's form is in the file as well."""
    tensors = stored_tensors(file)
    return sum(math.prod(t.shape) for name, t in tensors.items() if ".offset_" not in name)


def report(rows: list[dict[str, Any]]) -> None:
    print(
        f"{'method':12}{'lr':>8}{'held-out loss: mean':>21}{'of each seed':>27}"
        f"{'trained':>13}{'peak MB':>9}{'adapter MB':>12}"
    )
    for method in METHODS:
        own = [row for row in rows if row["method"] == method]
        if own:
            each = " ".join(f"{row['loss']:.4f}" for row in own)
            print(
                f"{method:12}{own[0]['lr']:8.0e}{statistics.mean(row['loss'] for row in own):21.4f}"
                f"{each:>27}{own[0]['trained']:13,}{max(row['peak_mb'] for row in own):9.0f}"
                f"{own[0]['adapter_mb']:12.1f}"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--runs", type=Path, default=ROOT / "runs/methods")
    parser.add_argument("--json", type=Path, default=Path(__file__).with_suffix(".json"))
    args = parser.parse_args()
    for seed in args.seeds:
        for method in args.methods:
            rows = rows_of(args.json)
            if (method, seed) not in {(row["method"], row["seed"]) for row in rows}:
                rows.append(run(method, seed, args.runs.resolve()))
                args.json.write_text(json.dumps(rows, indent=2) + "\n")
    report(rows_of(args.json))


if __name__ == "__main__":
    main()
