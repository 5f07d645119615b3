"""What it takes to compose ten adapters of the demo model, by each method of `dlora compose`.

    python benchmarks/composing.py [--adapters 10] [--r 16] [--json FILE]

Adapters of r=16 on all linear layers of a model of SmolLM2-135M's shapes, filled at random, each in
PEFT's files. A row is one process of one thread that runs the command; seconds are from its start
to its end, imports included, and memory is the most anonymous bytes above those after imports.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from dlora.library.mixtures import METHODS

HIDDEN, INNER, KEYS, LAYERS = 576, 1536, 192, 30
SHAPES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KEYS, HIDDEN),
    "self_attn.v_proj": (KEYS, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}
MEASURED = """
import sys
import torch
from dlora.library.compose import main
from dlora.runtime.memory import MemoryMeter

torch.set_num_threads(1)
meter = MemoryMeter()
assert main(sys.argv[1:]) == 0
print("peak", meter.peak())
"""


def save_adapter(directory: Path, seed: int, r: int) -> int:
    """A random adapter; the bytes of its tensors."""
    draw = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(LAYERS):
        for name, (m, n) in SHAPES.items():
            key = f"base_model.model.model.layers.{layer}.{name}.lora_"
            tensors[f"{key}A.weight"] = torch.randn(r, n, generator=draw) / n**0.5
            tensors[f"{key}B.weight"] = torch.randn(m, r, generator=draw) * 0.02
    directory.mkdir()
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "r": r,
        "lora_alpha": 2 * r,
        "target_modules": sorted({name.partition(".")[2] for name in SHAPES}),
    }
    (directory / "adapter_config.json").write_text(json.dumps(settings))
    return sum(tensor.nbytes for tensor in tensors.values())


def measured(words: list[str]) -> tuple[float, int]:
    """Seconds and bytes of one command."""
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, *words], check=True, capture_output=True, text=True
    )
    return time.monotonic() - began, int(done.stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--adapters", type=int, default=10)
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = {}
    with tempfile.TemporaryDirectory() as made:
        root = Path(made)
        sizes = [save_adapter(root / f"a{i}", i, options.r) for i in range(options.adapters)]
        mix = [f"{root / f'a{i}'}={(-1) ** i / options.adapters}" for i in range(options.adapters)]
        print(f"{options.adapters} adapters of {sizes[0] / 1e6:.1f} MB\n")
        print("| method | s | peak, MB |\n|---|---|---|")
        for method in METHODS:
            words = ["--adapters", *mix, "--method", method, "--to", str(root / method)]
            seconds, peak = measured(words)
            rows[method] = {"seconds": seconds, "peak": peak}
            print(f"| {method} | {seconds:.1f} | {peak / 1e6:.1f} |", flush=True)
    if options.json is not None:
        result = {"adapters": options.adapters, "r": options.r, "bytes": sizes[0], "rows": rows}
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
