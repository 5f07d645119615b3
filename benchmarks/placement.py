"""Step time, wire bytes and memory of one LoRA step, by placement of W0, beside PEFT's.

    torchrun --nproc-per-node 2 benchmarks/placement.py
    torchrun --nproc-per-node 4 benchmarks/placement.py --ranks-per-node 2 --rows alone node
    torchrun --nproc-per-node 2 benchmarks/placement.py --rows alone compiled products peft_fsdp2

The model and the step are those of `step.py`. Rows:
    alone         one process without a peer, on every rank at the same time: no collective at all
    none          dlora, a whole copy of W0 on each rank
    node, world   dlora, W0 over the ranks of a node, or of all nodes; each with engine fsdp2 and
                  zero3, and with 0, 50 and 100 % of W0 resident after its first use
    compiled      dlora under fsdp2 with all of W0 resident, its blocks eager and compiled
    products      the matrix products of the frozen layers alone, on every rank at the same time
    peft_fsdp2    PEFT adapters inside `fully_shard` per block
    peft_zero3    PEFT adapters under DeepSpeed stage 3: its defaults, which keep up to a billion
                  parameters gathered, and tuned: freed after use, one block gathered ahead
Rows alternate round by round in the same processes; medians are reported, and ratios are the median
of the per-round ratios to `alone`.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from peft import LoraConfig as PeftLoraConfig
from peft import get_peft_model
from rows import R, Row, adapted, base_model, dlora, peft, products, random_batch
from timing import alternate, peak_memory
from torch.distributed.device_mesh import init_device_mesh

from dlora import LoraConfig, attach
from dlora.methods.trained_replica import replicate
from dlora.sharding.engines.protocol import build_engine
from dlora.sharding.engines.storage import held_bytes
from dlora.sharding.topology import Placement, Topology

ENGINES, SHARES = ("fsdp2", "zero3"), (0.0, 0.5, 1.0)
FAMILIES = ("alone", "none", "node", "world", "compiled", "products", "peft_fsdp2", "peft_zero3")
BLOCK_NUMEL = 4 * 1024 * 1024 + 3 * 1024 * 2816  # of the benchmarks' model
DEEPSPEED = {
    "defaults": {},
    "tuned": {
        "stage3_max_reuse_distance": 0,
        "stage3_max_live_parameters": 2 * BLOCK_NUMEL,
        "stage3_prefetch_bucket_size": BLOCK_NUMEL,
        "stage3_param_persistence_threshold": 10_000,
    },
}


def alone(batch: torch.Tensor) -> Row:
    """The step of a single process: the same code with a world of one."""
    model = base_model()
    attach(model, LoraConfig(r=R))
    topology = Topology(0, 1, 1)
    replica = replicate(model, build_engine(Placement("fsdp2", "none", 1, 1), topology))
    return adapted(model, replica, batch)


def peft_zero3(batch: torch.Tensor, settings: dict[str, Any]) -> Row:
    """PEFT's adapters partitioned with W0 by DeepSpeed, which steps them."""
    config = PeftLoraConfig(r=R, lora_alpha=32, target_modules="all-linear")
    model = get_peft_model(base_model(), config, autocast_adapter_dtype=False)
    trained = [p for p in model.parameters() if p.requires_grad]
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.AdamW(trained, lr=1e-4, fused=True),
        config={
            "train_micro_batch_size_per_gpu": len(batch),
            "bf16": {"enabled": True},
            "gradient_clipping": 1.0,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "zero_optimization": {"stage": 3, **settings},
        },
    )

    def step() -> None:
        engine.backward(engine(input_ids=batch, labels=batch, use_cache=False).loss)
        engine.step()

    return Row(step, held_bytes(model))


def builders(
    families: list[str], ranks_per_node: int | None
) -> dict[str, Callable[[torch.Tensor], Row]]:
    """{name of a row: what builds it}, in the order of the table."""
    made: dict[str, Callable[[torch.Tensor], Row]] = {"alone": alone}
    if "none" in families:
        made["none"] = functools.partial(dlora, base="none")
    for base in ("node", "world"):
        for engine in ENGINES if base in families else ():
            for share in SHARES:
                made[f"{base} {engine} {share:.0%}"] = functools.partial(
                    dlora,
                    base=base,
                    engine=engine,
                    resident=share,
                    ranks_per_node=ranks_per_node,
                )
    for compiled in (False, True) if "compiled" in families else ():
        made["resident" + ", compiled" * compiled] = functools.partial(
            dlora, base="world", resident=1.0, compiled=compiled
        )
    if "products" in families:
        made["products"] = products
    if "peft_fsdp2" in families:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        made["peft_fsdp2"] = functools.partial(peft, mesh=mesh)
    for name, settings in DEEPSPEED.items() if "peft_zero3" in families else ():
        made[f"peft_zero3 {name}"] = functools.partial(peft_zero3, settings=settings)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", nargs="+", choices=FAMILIES, default=None)
    parser.add_argument("--ranks-per-node", type=int)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    families = args.rows or [f for f in FAMILIES if f not in ("node", "compiled", "products")]
    batch = random_batch(rank)
    rows, peaks = {}, {}
    for name, build in builders(families, args.ranks_per_node).items():
        rows[name], peaks[name] = peak_memory(build, batch)
    seconds, sent = alternate(rows, args.rounds)
    if rank == 0:
        table = [
            {
                "row": name,
                "step_seconds": statistics.median(seconds[name]),
                "over_alone": statistics.median(
                    own / other for own, other in zip(seconds[name], seconds["alone"], strict=True)
                ),
                "wire_mb_per_rank": statistics.median(sent[name]) / world / 1e6,
                "peak_mb": peaks[name] / 1e6,
                "seconds": seconds[name],
            }
            for name in rows
        ]
        print(f"{'row':20}{'step s':>9}{'/ alone':>9}{'wire MB':>10}{'peak MB':>10}")
        for line in table:
            print(
                f"{line['row']:20}{line['step_seconds']:9.3f}{line['over_alone']:9.3f}"
                f"{line['wire_mb_per_rank']:10.1f}{line['peak_mb']:10.0f}"
            )
        per_node = args.ranks_per_node or world
        summary = {"world": world, "ranks_per_node": per_node, "rounds": args.rounds}
        default = Path(__file__).with_name(f"placement_{world}_ranks.json")
        (args.json or default).write_text(json.dumps({**summary, "rows": table}, indent=2) + "\n")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
