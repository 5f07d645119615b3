"""Step time, wire bytes and memory of one LoRA step on a packed base, beside bf16 and PEFT.

    torchrun --nproc-per-node 2 benchmarks/quantised.py

The model and the step are those of `step.py`. Rows, for each place of W0 (`none`: a whole copy on
each rank, `fsdp2` and `zero3`: divided over the ranks):
    bf16          W0 as it is
    nf4           unpacked by bitsandbytes' kernel
    nf4 in torch  unpacked by dlora's own
    nf4-dq, int8
    peft          PEFT's adapters beside bitsandbytes' Linear4bit, a whole copy on each rank
Rows alternate round by round in the same processes; medians are reported, and ratios are the median
of the per-round ratios to `bf16` in the same place.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import bitsandbytes
import torch
import torch.distributed as dist
from peft import LoraConfig as PeftLoraConfig
from peft import get_peft_model
from rows import R, Row, base_model, random_batch, trainer
from rows import dlora as dlora_row
from timing import alternate, peak_memory
from torch import nn

from dlora.quant import dequantize as kernel
from dlora.sharding.engines.storage import held_bytes

PLACES = {"none": ("none", "fsdp2"), "fsdp2": ("world", "fsdp2"), "zero3": ("world", "zero3")}
FORMATS = {"bf16": "none", "nf4": "nf4", "nf4-dq": "nf4-dq", "int8": "int8"}


def without_bitsandbytes(row: Row) -> Row:
    """The same row with dlora's own kernel."""
    own_step = row.step

    def step() -> None:
        found, kernel.bitsandbytes_kernel = kernel.bitsandbytes_kernel, lambda: None
        try:
            own_step()
        finally:
            kernel.bitsandbytes_kernel = found

    return Row(step, row.held)


def in_torch(batch: torch.Tensor, base: str, engine: str) -> Row:
    return without_bitsandbytes(dlora_row(batch, base, engine=engine, quantization="nf4"))


def peft(batch: torch.Tensor) -> Row:
    """What `BitsAndBytesConfig(load_in_4bit=True, …)` and `get_peft_model` make of the model."""
    model = base_model()
    for block in model.model.layers:
        for path, layer in list(block.named_modules()):
            if isinstance(layer, nn.Linear):
                packed = bitsandbytes.nn.Linear4bit(
                    layer.in_features,
                    layer.out_features,
                    bias=False,
                    compute_dtype=torch.bfloat16,
                    compress_statistics=False,
                    quant_type="nf4",
                )
                packed.weight = bitsandbytes.nn.Params4bit(
                    layer.weight.data,
                    requires_grad=False,
                    quant_type="nf4",
                    compress_statistics=False,
                )
                block.set_submodule(path, packed.to("cpu"))
    config = PeftLoraConfig(r=R, lora_alpha=32, target_modules="all-linear")
    model = get_peft_model(model, config)
    states = [p.quant_state for p in model.parameters() if hasattr(p, "quant_state")]
    held = held_bytes(model) + sum(state.absmax.nbytes for state in states)
    trained = [p for p in model.parameters() if p.requires_grad]
    return Row(trainer(model, batch, trained), held)


def builders(places: list[str]) -> dict[str, tuple[str, Callable[[torch.Tensor], Row]]]:
    """{name of a row: (its place, what builds it)}, in the order of the table."""
    made: dict[str, tuple[str, Callable[[torch.Tensor], Row]]] = {}
    for place in places:
        base, engine = PLACES[place]
        where = {"base": base, "engine": engine}
        for name, quantization in FORMATS.items():
            build = functools.partial(dlora_row, **where, quantization=quantization)
            made[f"{place}: {name}"] = place, build
            if name == "nf4":
                made[f"{place}: nf4 in torch"] = place, functools.partial(in_torch, **where)
        if place == "none":
            made[f"{place}: peft"] = place, peft
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--places", nargs="+", choices=list(PLACES), default=list(PLACES))
    parser.add_argument("--json", type=Path, default=Path(__file__).with_suffix(".json"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    batch = random_batch(rank)
    rows, peaks, place_of = {}, {}, {}
    for name, (place, build) in builders(args.places).items():
        rows[name], peaks[name] = peak_memory(build, batch)
        place_of[name] = place
    seconds, sent = alternate(rows, args.rounds)
    if rank == 0:
        table = [
            {
                "row": name,
                "step_seconds": statistics.median(seconds[name]),
                "over_bf16": statistics.median(
                    own / other
                    for own, other in zip(
                        seconds[name], seconds[f"{place_of[name]}: bf16"], strict=True
                    )
                ),
                "wire_mb_per_rank": statistics.median(sent[name]) / world / 1e6,
                "held_mb": rows[name].held / 1e6,
                "peak_mb": peaks[name] / 1e6,
                "seconds": seconds[name],
            }
            for name in rows
        ]
        print(f"{'row':20}{'step s':>9}{'/ bf16':>9}{'wire MB':>10}{'held MB':>10}{'peak MB':>10}")
        for line in table:
            print(
                f"{line['row']:20}{line['step_seconds']:9.3f}{line['over_bf16']:9.3f}"
                f"{line['wire_mb_per_rank']:10.1f}{line['held_mb']:10.1f}{line['peak_mb']:10.0f}"
            )
        summary = {"world": world, "rounds": args.rounds}
        args.json.write_text(json.dumps({**summary, "rows": table}, indent=2) + "\n")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
