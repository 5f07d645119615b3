"""How long it takes to swap an adapter in from a file on a running, sharded model.

    python benchmarks/swapping.py [--rounds 20]

The demo model, SmolLM2-135M in bfloat16, over two ranks with half of W0 each; adapters of r=16 on
all linear layers, in float32 as `save_adapter` writes them. Two files take each other's place under
one name. Seconds from a barrier to the return of `load_adapter`, on the slower rank, and of its
processor alone; the forward pass of 1×64 tokens before it and right after it; the broadcast alone.
"""

from __future__ import annotations

import argparse
import functools
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

import torch
import torch.distributed as dist
from runs import ROOT
from transformers import AutoModelForCausalLM, GgufConfig

from dlora import LoraConfig, attach, load_adapter, remove, save_adapter, shard
from dlora.lora.attach import trainable_parameters

MODEL = ROOT / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
R, TOKENS = 16, 64


def made(directory: Path) -> Any:
    """The sharded model; rank 0 writes two adapters with random values."""
    model = AutoModelForCausalLM.from_pretrained(
        MODEL.parent,
        gguf_file=MODEL.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
    ).eval()
    if dist.get_rank() == 0:
        for name in ("one", "two"):
            attach(model, LoraConfig(r=R), name)
            for parameter in trainable_parameters(model, name).values():
                torch.nn.init.normal_(parameter, std=0.02)
            save_adapter(model, directory / name, name=name)
            remove(model, name)
    shard(model, base="world")
    return model


def slower(seconds: float) -> float:
    """The time of the slower rank."""
    found = torch.tensor(seconds)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return float(found)


def timed(call: Callable[[], Any], clock: Callable[[], float] = time.perf_counter) -> float:
    dist.barrier()
    began = clock()
    call()
    return slower(clock() - began)


def worker(directory: Path, rounds: int, into: Path) -> None:
    dist.init_process_group("gloo")
    model = made(directory)
    ids = torch.arange(TOKENS)[None]
    file = directory / "one" / "adapter_model.safetensors"

    @torch.no_grad()
    def forward() -> None:
        model(input_ids=ids, use_cache=False)

    files = [directory / "two", directory / "one"]
    load_adapter(model, files[1], "a")
    flat = torch.zeros(sum(p.numel() for p in trainable_parameters(model, "a").values()))
    names = ("swap", "processor", "before", "after", "broadcast")
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds + 2):
        swap = functools.partial(load_adapter, model, files[number % 2], "a")
        taken = {
            "processor": timed(swap, time.process_time),
            "before": timed(forward),
            "swap": timed(swap),
            "after": timed(forward),
            "broadcast": timed(lambda: dist.broadcast(flat, src=0)),
        }
        for name, value in taken.items() if number >= 2 else ():
            seconds[name].append(value)
    if dist.get_rank() == 0:
        found = {"file_bytes": file.stat().st_size, "adapter_bytes": flat.nbytes}
        into.write_text(json.dumps(found | {"seconds": seconds}))
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--worker", nargs=2, type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, default=Path(__file__).with_suffix(".json"))
    args = parser.parse_args()
    if args.worker:
        worker(args.worker[0], args.rounds, args.worker[1])
        return
    with tempfile.TemporaryDirectory() as place:
        into = Path(place) / "found.json"
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command = [*launcher, "--nproc-per-node=2", __file__, "--rounds", str(args.rounds)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run([*command, "--worker", place, str(into)], env=environment, check=True)
        found = json.loads(into.read_text())
    print(f"a file of {found['file_bytes'] / 1e6:.1f} MB")
    for name, values in found["seconds"].items():
        low, high = min(values), max(values)
        print(f"{name}: {statistics.median(values):.3f} s ({low:.3f} to {high:.3f})")
    args.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
