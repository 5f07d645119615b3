"""Step time, memory and wire bytes of AdaLoRA over those of LoRA of the same initial rank.

    torchrun --nproc-per-node 2 benchmarks/adalora.py [--rounds 5] [--families dlora peft peft_ddp]

The model and the step are those of `step.py`, with r = init_r = 12 and target_r = 8. Families:
    dlora      W0 under FSDP2, adapters replicated
    peft       PEFT, each rank a process of its own: no collective at all
    peft_ddp   PEFT under DistributedDataParallel
and the rows of each:
    lora       plain LoRA: what the other rows are divided by
    scores     averages follow every step, no mask falls
    masks      and a mask falls after every step
    final      after the last mask: dlora has shrunk, PEFT zeroes the pruned λ at every step
The rows of a family alternate round by round in the same processes; medians are reported, and
ratios are medians of the per-round ratios to `lora`. Beside wall time stands the processor time of
rank 0, which others on the machine disturb less.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import AdaLoraConfig as PeftAdaLoraConfig
from peft import LoraConfig as PeftLoraConfig
from peft import get_peft_model
from rows import Row, adapted, base_model, random_batch
from timing import alternate
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dlora import AdaLoraConfig, LoraConfig, attach, shard
from dlora.methods.adalora import RankAllocator
from dlora.methods.trained_replica import TrainedReplica

INIT_R, TARGET_R, ALPHA, GAMMA = 12, 8, 32, 0.1
LONG = 1_000_000  # steps: more than anybody makes here
PHASES = {
    "scores": {"tinit": LONG // 2, "tfinal": 1, "deltaT": 1, "total_step": LONG},
    "masks": {"tinit": 0, "tfinal": 1, "deltaT": 1, "total_step": LONG},
    "final": {"tinit": 0, "tfinal": LONG - 2, "deltaT": 1, "total_step": LONG},
}
ROWS = ("lora", *PHASES)
WARM_UP = 3  # steps of each row before it is timed; `final` makes its last mask in them


@dataclass
class Meter:
    """What is read off a row beside wall time.

    Attributes:
        cpu: processor seconds of this process, by step.
        allocator: seconds in AdaLoRA's own work, by step: regulariser, averages, scores, mask.
        wire: bytes that this rank's collectives sent, as dlora counts them, by step.
        exact: figures that no clock is needed for.
    """

    cpu: list[float] = field(default_factory=list)
    allocator: list[float] = field(default_factory=list)
    wire: list[int] = field(default_factory=list)
    exact: dict[str, Any] = field(default_factory=dict)

    def metered(self, row: Row, replica: TrainedReplica | None = None) -> Row:
        """The row, read at every step."""

        def step() -> None:
            self.allocator.append(0.0)
            began = time.process_time()
            row.step()
            self.cpu.append(time.process_time() - began)
            if replica is not None:
                self.wire.append(replica.wire.take())

        return Row(step, row.held)

    def timed(self, call: Callable[..., None]) -> Callable[..., None]:
        """A call whose time counts as the allocator's."""

        @functools.wraps(call)
        def timed(*args: Any) -> None:
            began = time.perf_counter()
            call(*args)
            self.allocator[-1] += time.perf_counter() - began

        return timed

    def forget(self) -> None:
        """Drop the steps so far."""
        for of_steps in (self.cpu, self.allocator, self.wire):
            of_steps.clear()


def dlora(name: str, batch: torch.Tensor, meter: Meter) -> Row:
    model = base_model()
    config = LoraConfig(r=INIT_R, lora_alpha=ALPHA)
    if name != "lora":
        config = AdaLoraConfig(
            init_r=INIT_R,
            target_r=TARGET_R,
            lora_alpha=ALPHA,
            orth_reg_weight=GAMMA,
            **PHASES[name],
        )
    attach(model, config)
    replica = shard(model, base="world")
    numel = len(replica.values)
    meter.exact["adapter_parameters"] = numel
    meter.exact["replica_bytes"] = replica_bytes(replica)
    allocator = replica.method
    if isinstance(allocator, RankAllocator):
        averages = averages_bytes(allocator)
        meter.exact["triplets"] = sum(allocator.ranks.values())
        meter.exact["averages_bytes"] = averages
        meter.exact["averages_bytes_per_parameter"] = averages / numel
        for moment in ("before_reduce", "after_step"):
            setattr(allocator, moment, meter.timed(getattr(allocator, moment)))
    row = meter.metered(adapted(model, replica, batch), replica)
    for _ in range(WARM_UP):
        row.step()
    if name == "final" and isinstance(allocator, RankAllocator):
        averages = averages_bytes(allocator)
        meter.exact["after_shrinking"] = {
            "adapter_parameters": len(replica.values),
            "replica_bytes": replica_bytes(replica),
            "triplets": sum(allocator.ranks.values()),
            "averages_bytes": averages,
        }
    return row


def averages_bytes(allocator: RankAllocator) -> int:
    """Bytes of the scorer's averages of this rank."""
    return sum(a.nbytes for kinds in allocator.tensors()["scorer"].values() for a in kinds.values())


def replica_bytes(replica: TrainedReplica) -> int:
    """Bytes of the two flat buffers: values, and gradients with their tail."""
    share = replica.strategy
    return sum(t.untyped_storage().nbytes() for t in (share.values, share.gradients))


def peft(name: str, batch: torch.Tensor, meter: Meter, *, ddp: bool = False) -> Row:
    """A and B in float32, as PEFT has them by default and dlora does."""
    common = {"lora_alpha": ALPHA, "target_modules": "all-linear"}
    config = PeftLoraConfig(r=INIT_R, **common)
    if name != "lora":
        config = PeftAdaLoraConfig(
            init_r=INIT_R, target_r=TARGET_R, orth_reg_weight=GAMMA, **PHASES[name], **common
        )
    model = get_peft_model(base_model(), config)
    trained = [p for p in model.parameters() if p.requires_grad]
    called: nn.Module = DistributedDataParallel(model) if ddp else model
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    allocate: Callable[[int], None] | None = None
    if name != "lora":
        allocate = meter.timed(model.base_model.update_and_allocate)
    made = 0

    def step() -> None:
        nonlocal made
        called(input_ids=batch, labels=batch, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        made += 1
        if allocate is not None:
            allocate(made)
        optimizer.zero_grad()

    row = meter.metered(Row(step, 0))
    for _ in range(WARM_UP):
        row.step()
    return row


FAMILIES = {
    "dlora": dlora,
    "peft": peft,
    "peft_ddp": functools.partial(peft, ddp=True),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--json", type=Path, default=Path(__file__).with_suffix(".json"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    batch = random_batch(rank)
    for family in args.families:
        meters = {name: Meter() for name in ROWS}
        rows = {name: FAMILIES[family](name, batch, meters[name]) for name in ROWS}
        for meter in meters.values():
            meter.forget()
        seconds, _ = alternate(rows, args.rounds)
        if rank == 0:
            table = [line(name, meters, seconds) for name in ROWS]
            extras = wire_per_triplet(meters) if family == "dlora" else {}
            report(family, table, extras)
            known = json.loads(args.json.read_text()) if args.json.exists() else {}
            known[family] = {"world": world, "rounds": args.rounds, **extras, "rows": table}
            args.json.write_text(json.dumps(known, indent=2) + "\n")
        del rows
    dist.barrier()
    dist.destroy_process_group()


def line(
    name: str,
    meters: dict[str, Meter],
    seconds: dict[str, list[float]],
) -> dict[str, Any]:
    own = meters[name]
    return {
        "row": name,
        "step_seconds": statistics.median(seconds[name]),
        "over_lora": median_ratio(seconds[name], seconds["lora"]),
        "cpu_seconds": statistics.median(own.cpu),
        "cpu_over_lora": median_ratio(own.cpu, meters["lora"].cpu),
        "allocator_seconds": statistics.median(own.allocator),
        **({"wire_bytes": statistics.median(own.wire)} if own.wire else {}),
        **own.exact,
        "seconds": seconds[name],
    }


def median_ratio(own: list[float], other: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(own, other, strict=True))


def wire_per_triplet(meters: dict[str, Meter]) -> dict[str, float]:
    """Bytes that a rank sends more, divided by the triplets at the start."""
    sent = {name: statistics.median(meters[name].wire) for name in ROWS}
    triplets = meters["scores"].exact["triplets"]
    return {
        "mask_bytes_per_triplet": (sent["masks"] - sent["scores"]) / triplets,
        "scores_over_lora_bytes_per_triplet": (sent["scores"] - sent["lora"]) / triplets,
    }


def report(family: str, table: list[dict[str, Any]], extras: dict[str, float]) -> None:
    print(f"{family:9}{'step s':>9}{'/ lora':>9}{'CPU s':>9}{'/ lora':>9}{'allocator ms':>14}")
    for row in table:
        print(
            f"{row['row']:9}{row['step_seconds']:9.3f}{row['over_lora']:9.3f}"
            f"{row['cpu_seconds']:9.3f}{row['cpu_over_lora']:9.3f}"
            f"{1e3 * row['allocator_seconds']:14.1f}"
        )
    for name, value in extras.items():
        print(f"  {name}: {value:.4f}")
    for row in table:
        if row.get("averages_bytes") is not None:
            exact = {k: v for k, v in row.items() if k.endswith(("bytes", "parameters"))}
            print(f"  {row['row']}: {exact} {row.get('after_shrinking', '')}")


if __name__ == "__main__":
    main()
