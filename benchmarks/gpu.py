"""One GPU, a Llama-shaped bf16 model that fills a part of it: dlora beside PEFT.

    python benchmarks/gpu.py [--fill 0.4] [--rounds 5]

Random weights, r=16 on all linear layers, 2 × 2048 tokens. The number of layers follows from the
GPU's memory. Rows alternate round by round, and medians are reported: seconds of a step, most bytes
that the allocator gave out, and the step over PEFT's.
    peft          PEFT's adapters, float32 masters
    dlora         the same step
    dropout       both with dropout 0.05
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from dlora import LoraConfig, attach, shard

SHAPE = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
}
LAYER_BYTES = 2 * (2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
ROWS, TOKENS, R = 2, 2048, 16
Step = Callable[[], None]
Build = Callable[[int, torch.Tensor, float], Step]


def model_of(layers: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = LlamaForCausalLM._from_config(
            LlamaConfig(**SHAPE, num_hidden_layers=layers), dtype=torch.bfloat16
        )
    return model.train()


def dlora_step(layers: int, batch: torch.Tensor, dropout: float) -> Step:
    model = model_of(layers)
    attach(model, LoraConfig(r=R, lora_alpha=R, lora_dropout=dropout))
    replica = shard(model)
    optimizer = torch.optim.AdamW(replica.parameter_groups(lr=1e-4), fused=True)

    def step() -> None:
        model(input_ids=batch, labels=batch, use_cache=False).loss.backward()
        reduced = replica.reduce_gradients()
        replica.clip(1.0, reduced.norm)
        optimizer.step()
        replica.zero_grad()

    return step


def peft_step(layers: int, batch: torch.Tensor, dropout: float) -> Step:
    config = PeftLoraConfig(
        r=R, lora_alpha=R, lora_dropout=dropout, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    model = get_peft_model(model_of(layers), config)
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.data = parameter.data.float()
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def timed(step: Step) -> float:
    torch.cuda.synchronize()
    began = time.perf_counter()
    step()
    torch.cuda.synchronize()
    return time.perf_counter() - began


def peak_of(build: Build, layers: int, batch: torch.Tensor, dropout: float) -> tuple[Step, int]:
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step = build(layers, batch, dropout)
    step()
    step()
    return step, torch.cuda.max_memory_allocated() - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--fill", type=float, default=0.2, help="share of the GPU for each W0")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, default=Path(__file__).with_suffix(".json"))
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit(f"no GPU; torch is {torch.__version__}")
    total = torch.cuda.get_device_properties(0).total_memory
    layers = max(1, round(args.fill * total / LAYER_BYTES))
    batch = torch.randint(0, SHAPE["vocab_size"], (ROWS, TOKENS), device="cuda")
    table = []
    for dropout in (0.0, 0.05):
        steps, peaks, seconds = {}, {}, {}
        for name, build in (("peft", peft_step), ("dlora", dlora_step)):
            steps[name], peaks[name] = peak_of(build, layers, batch, dropout)
            seconds[name] = []
        for _ in range(args.rounds):
            for name, step in steps.items():
                seconds[name].append(timed(step))
        for name in steps:
            ratios = [a / b for a, b in zip(seconds[name], seconds["peft"], strict=True)]
            table.append(
                {
                    "row": name,
                    "dropout": dropout,
                    "step_seconds": statistics.median(seconds[name]),
                    "over_peft": statistics.median(ratios),
                    "peak_gb": peaks[name] / 1e9,
                }
            )
        del steps
    print(f"{torch.cuda.get_device_name(0)}, torch {torch.__version__}, {layers} layers")
    print(f"{'row':8}{'dropout':>9}{'step s':>9}{'/ peft':>9}{'peak GB':>10}")
    for line in table:
        print(
            f"{line['row']:8}{line['dropout']:9.2f}{line['step_seconds']:9.3f}"
            f"{line['over_peft']:9.3f}{line['peak_gb']:10.2f}"
        )
    machine = {"gpu": torch.cuda.get_device_name(0), "torch": torch.__version__, "layers": layers}
    args.json.write_text(json.dumps({**machine, "rows": table}, indent=2) + "\n")


if __name__ == "__main__":
    main()
