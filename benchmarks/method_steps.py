"""Step time and memory of the methods beside LoRA and PEFT, and how long PiSSA takes to start.

    torchrun --nproc-per-node 2 benchmarks/method_steps.py [--rounds 7] [--starts 3]

Steps: the model and the step of `step.py`, a whole copy of W0 on each rank, so that arithmetic is
compared and nothing else. Rows alternate round by round in the same processes; medians are
reported, and ratios are the median of the per-round ratios to `lora`. PEFT's rows reduce nothing.

Starts: `init_lora_weights: pissa` on the demo model, W0 sharded over the ranks, one thread each,
beside PEFT's in one process with as many threads as there are ranks, in turn.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import LoraConfig as PeftLoraConfig
from peft import get_peft_model
from rows import R, Row, adamw, adapted, base_model, random_batch, trainer
from timing import alternate, peak_memory
from transformers import AutoModelForCausalLM

from dlora import AdaLoraConfig, FloraConfig, LoraConfig, attach, quantize, shard
from dlora.base.model import find_base
from dlora.methods.trained_replica import TrainedReplica
from dlora.optim.eight_bit import adamw8bit
from dlora.optim.lora_pro import LoraPro
from dlora.sharding.engines.storage import held_bytes

ROOT = Path(__file__).parent.parent
DEMO = ROOT / "models/SmolLM2-135M-Instruct.Q4_1.gguf"
PACKED = "nf4"
METHODS: dict[str, LoraConfig] = {
    "lora": LoraConfig(r=R),
    "dora": LoraConfig(r=R, use_dora=True),
    "pissa": LoraConfig(r=R, init_lora_weights="pissa"),
    "flora": FloraConfig(r=R),
    "adalora": AdaLoraConfig(init_r=R * 3 // 2, target_r=R, tinit=0, tfinal=900, total_step=1000),
    "lora nf4": LoraConfig(r=R),
    "dora nf4": LoraConfig(r=R, use_dora=True),
    "lora_pro": LoraConfig(r=R),
    "adamw8bit": LoraConfig(r=R),
}
OPTIMIZERS: dict[str, Callable[[TrainedReplica], torch.optim.Optimizer]] = {
    "lora_pro": lambda replica: replica.attach_optimizer(
        LoraPro(replica.parameter_groups(lr=1e-4), replica.pairs)
    ),
    "adamw8bit": lambda replica: replica.attach_optimizer(
        adamw8bit(replica.parameter_groups(lr=1e-4), paged=False)
    ),
}


def dlora(name: str, batch: torch.Tensor) -> Row:
    model = base_model()
    if name.endswith(PACKED):
        quantize(model, PACKED)
    replica = shard(model, base="none")
    attach(model, METHODS[name])
    return adapted(model, replica, batch, OPTIMIZERS.get(name, adamw))


def full(batch: torch.Tensor) -> Row:
    """Every weight of the blocks, in bf16; nothing is reduced."""
    model = base_model().requires_grad_(False)
    trained = list(model.model.layers.requires_grad_().parameters())
    return Row(trainer(model, batch, trained), held_bytes(model))


def peft(batch: torch.Tensor, **settings: Any) -> Row:
    config = PeftLoraConfig(r=R, lora_alpha=32, target_modules="all-linear", **settings)
    model = get_peft_model(base_model(), config)
    trained = [p for p in model.parameters() if p.requires_grad]
    return Row(trainer(model, batch, trained), held_bytes(model))


ROWS: dict[str, Callable[[torch.Tensor], Row]] = {
    **{name: functools.partial(dlora, name) for name in METHODS},
    "full": full,
    "peft lora": peft,
    "peft dora": functools.partial(peft, use_dora=True),
}


def starts(count: int) -> dict[str, list[float]]:
    """Seconds of PiSSA's start on the demo model, by whose it is."""
    rank, world = dist.get_rank(), dist.get_world_size()
    seconds: dict[str, list[float]] = {"dlora": [], "peft": []}
    source = find_base(str(DEMO), dtype="bfloat16", cache_dir=str(ROOT / "models/converted")).source
    for _ in range(count):
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
        shard(model, base="world")
        with timed(seconds["dlora"]):
            attach(model, LoraConfig(r=R, init_lora_weights="pissa"))
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
        config = PeftLoraConfig(r=R, target_modules="all-linear", init_lora_weights="pissa")
        with timed(seconds["peft"]):
            if rank == 0:
                torch.set_num_threads(world)
                get_peft_model(model, config)
                torch.set_num_threads(1)
    return seconds


@contextlib.contextmanager
def timed(into: list[float]) -> Any:
    """Add the seconds from when all ranks are here to when all are through."""
    dist.barrier()
    began = time.perf_counter()
    yield
    dist.barrier()
    into.append(time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--starts", type=int, default=3)
    parser.add_argument("--json", type=Path, default=Path(__file__).with_suffix(".json"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    began = starts(args.starts)
    batch = random_batch(rank)
    rows, peaks = {}, {}
    for name, build in ROWS.items():
        rows[name], peaks[name] = peak_memory(build, batch)
    seconds, _ = alternate(rows, args.rounds)
    if rank == 0:
        table = [
            {
                "row": name,
                "step_seconds": statistics.median(seconds[name]),
                "over_lora": statistics.median(
                    own / other for own, other in zip(seconds[name], seconds["lora"], strict=True)
                ),
                "held_mb": rows[name].held / 1e6,
                "peak_mb": peaks[name] / 1e6,
                "seconds": seconds[name],
            }
            for name in rows
        ]
        print(f"{'row':12}{'step s':>9}{'/ lora':>9}{'held MB':>10}{'peak MB':>10}")
        for line in table:
            print(
                f"{line['row']:12}{line['step_seconds']:9.3f}{line['over_lora']:9.3f}"
                f"{line['held_mb']:10.1f}{line['peak_mb']:10.0f}"
            )
        medians = {name: statistics.median(found) for name, found in began.items()}
        print(
            f"pissa starts in {medians['dlora']:.2f} s over {world} ranks, PEFT's in "
            f"{medians['peft']:.2f} s in one process: {medians['dlora'] / medians['peft']:.2f}"
        )
        summary = {"world": world, "rounds": args.rounds, "start_seconds": began}
        args.json.write_text(json.dumps({**summary, "rows": table}, indent=2) + "\n")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
