"""Step time, wire bytes and memory of one LoRA step on a sharded base, beside its peers.

    torchrun --nproc-per-node 2 benchmarks/step.py [--rounds 7] [--rows dlora peft full]

A Llama-shaped bf16 model (random weights), r=16 on all linear layers, 4×256 tokens per rank. Rows:
    floor   the frozen model alone: same wrapping, no adapter, forward, and backward to the
    embeddings dlora   W0 under FSDP2, A and B replicated
    peft    PEFT adapters inside `fully_shard` per block: A and B sharded with W0
    full    full fine-tuning with `fully_shard` per block
    dlora_compiled, peft_compiled   with each block compiled (torch's compiler takes minutes first)
Every row runs in the same processes and they alternate round by round; medians are reported, and
the ratio to the floor is the median of the per-round ratios. Every row runs forward, the same loss,
backward, and (but for the floor) clip, AdamW and zero_grad.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import torch
import torch.distributed as dist
from rows import Row, adapter_parameters, base_model, fully_shard_blocks, random_batch, trainer
from rows import dlora as dlora_row
from rows import peft as peft_row
from timing import alternate, peak_memory
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from dlora.sharding.engines.storage import held_bytes


def all_ranks() -> DeviceMesh:
    return init_device_mesh("cpu", (dist.get_world_size(),))


def floor(batch: torch.Tensor) -> Row:
    model = base_model().requires_grad_(False)
    fully_shard_blocks(model, model.model.layers, all_ranks())

    def to_embeddings(module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        return output.requires_grad_()

    model.model.embed_tokens.register_forward_hook(to_embeddings)

    def step() -> None:
        model(input_ids=batch, labels=batch, use_cache=False).loss.backward()

    return Row(step, held_bytes(model))


def dlora(batch: torch.Tensor) -> Row:
    return dlora_row(batch, base="world")


def peft(batch: torch.Tensor) -> Row:
    return peft_row(batch, all_ranks())


def dlora_compiled(batch: torch.Tensor) -> Row:
    return dlora_row(batch, base="world", compiled=True)


def peft_compiled(batch: torch.Tensor) -> Row:
    return peft_row(batch, all_ranks(), compiled=True)


def full(batch: torch.Tensor) -> Row:
    model = base_model()
    fully_shard_blocks(model, model.model.layers, all_ranks())
    parameters = list(model.parameters())
    step = trainer(model, batch, parameters)
    return Row(step, sum(p.to_local().nbytes for p in parameters))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--rows", nargs="+", default=["floor", "dlora", "peft", "full"])
    parser.add_argument("--json", type=Path, default=Path(__file__).with_suffix(".json"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    batch = random_batch(rank)

    rows, peaks = {}, {}
    for build in (floor, dlora, peft, full, dlora_compiled, peft_compiled):
        if build.__name__ in {"floor", "dlora", *args.rows}:
            rows[build.__name__], peaks[build.__name__] = peak_memory(build, batch)
    seconds, sent = alternate(rows, args.rounds)
    if rank == 0:
        report(rows, peaks, seconds, sent, world, args)
    dist.barrier()
    dist.destroy_process_group()


def report(rows, peaks, seconds, sent, world, args) -> None:  # noqa: ANN001
    skeleton = base_model()
    total = sum(p.nbytes for p in skeleton.parameters())
    gathers, reduction = expected_bytes(skeleton, world)
    table = [
        {
            "row": name,
            "step_seconds": statistics.median(seconds[name]),
            "over_floor": statistics.median(
                own / base for own, base in zip(seconds[name], seconds["floor"], strict=True)
            ),
            "wire_mb_per_rank": statistics.median(sent[name]) / world / 1e6,
            "peak_mb": peaks[name] / 1e6,
            "seconds": seconds[name],
            "w0_held_mb": rows[name].held / 1e6,
        }
        for name in rows
    ]
    print(f"{'row':16}{'step s':>9}{'/ floor':>9}{'wire MB':>10}{'peak MB':>10}{'W0 held MB':>12}")
    for line in table:
        print(
            f"{line['row']:16}{line['step_seconds']:9.3f}{line['over_floor']:9.3f}"
            f"{line['wire_mb_per_rank']:10.1f}{line['peak_mb']:10.0f}{line['w0_held_mb']:12.1f}"
        )
    own = next(line for line in table if line["row"] == "dlora")
    needed = (gathers + reduction) / 1e6
    print(f"W0 is {total / 1e6:.1f} MB; 1/{world} of it {total / world / 1e6:.1f} MB")
    print(
        f"dlora sends {own['wire_mb_per_rank']:.1f} MB per rank; gathers of W0 "
        f"({gathers / 1e6:.1f}) and one reduction ({reduction / 1e6:.1f}) need {needed:.1f}: "
        f"ratio {own['wire_mb_per_rank'] / needed:.4f}"
    )
    summary = {"world": world, "rounds": args.rounds, "w0_bytes": total, "needed_mb": needed}
    args.json.write_text(json.dumps({**summary, "rows": table}, indent=2) + "\n")


def expected_bytes(model: nn.Module, world: int) -> tuple[float, float]:
    """Ring bytes per rank: blocks gathered twice, the rest once; float32 A and B reduced once."""
    share = (world - 1) / world
    blocks = sum(p.nbytes for p in model.model.layers.parameters())
    rest = sum(p.nbytes for p in model.parameters()) - blocks
    return (2 * blocks + rest) * share, 2 * 4 * adapter_parameters(model) * share


if __name__ == "__main__":
    main()
