"""What head and loss cost, beside their two matrix products alone.

    python benchmarks/head.py [--dtype float32] [--targets 512] [--rounds 5] [--json FILE]

A head of the demo model's size (49,152 × 576), frozen, its loss and the gradient of its input, in
one process of one thread. Rows alternate; seconds are of the thread's CPU time, so that other
work on the machine is not counted.

    products      z = h Wᵀ and dz W, in chunks of dlora's size, without any loss
    dlora         `target_loss`
    torch         `torch.nn.functional.linear_cross_entropy` in chunks as torch chooses them
    whole logits  `linear`, `cross_entropy`, autograd
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dlora.objectives.chunked_loss import chunk_rows, target_loss
from dlora.objectives.output_head import OutputHead

HIDDEN, VOCABULARY = 576, 49_152


def rows(dtype: torch.dtype, targets: int) -> dict[str, Callable[[], object]]:
    """What is measured, by name."""
    torch.manual_seed(0)
    linear = nn.Linear(HIDDEN, VOCABULARY, bias=False, dtype=dtype).requires_grad_(False)
    W, h = linear.weight, torch.randn(targets, HIDDEN, dtype=dtype)
    labels = torch.randint(0, VOCABULARY, (targets,))
    positions = torch.stack([torch.zeros_like(labels), torch.arange(targets)], 1)
    head, chunk = OutputHead(linear, lambda z: z), chunk_rows(VOCABULARY, "cpu")

    def products() -> None:
        for part in h.split(chunk):
            torch.mm(torch.mm(part, W.t()), W)

    def gradient(loss: Callable[[Tensor], Tensor]) -> Callable[[], Tensor | None]:
        def step() -> Tensor | None:
            x = h.clone().requires_grad_()
            loss(x).backward()
            return x.grad

        return step

    def whole(x: Tensor) -> Tensor:
        return F.cross_entropy(linear(x).float(), labels, reduction="sum")

    def fused(x: Tensor) -> Tensor:
        options = nn.LinearCrossEntropyOptions()
        return F.linear_cross_entropy(x, W, labels, reduction="sum", options=options)

    return {
        "products": products,
        "dlora": gradient(lambda x: target_loss(head, x[None], labels[None], positions)),
        "torch": gradient(fused),
        "whole logits": gradient(whole),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--targets", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = rows(getattr(torch, options.dtype), options.targets)
    seconds: dict[str, list[float]] = {name: [] for name in found}
    for number in range(options.rounds + 1):  # the first warms up
        for name, step in found.items():
            began = time.thread_time()
            step()
            if number:
                seconds[name].append(time.thread_time() - began)
    medians = {name: statistics.median(taken) for name, taken in seconds.items()}
    print(
        f"{options.targets} targets, {options.dtype}\n\n| | ms | over the products |\n|---|---|---|"
    )
    for name, taken in medians.items():
        print(f"| {name} | {1000 * taken:.0f} | {taken / medians['products']:.2f} |")
    if options.json is not None:
        result = {"dtype": options.dtype, "targets": options.targets, "seconds": seconds}
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
