"""Seconds per target token on sequences of mixed lengths: dlora's runs beside TRL's `SFTTrainer`.

    python benchmarks/mixed_lengths.py [--ranks 2]

Texts of 16 to 1024 tokens, log-normal as instruction data has them, every token a target; LoRA of
rank 16 on all linear layers of a small Llama, steps of the same 16 sequences, in one process or,
with `--ranks`, with W0 sharded by FSDP2 over that many. Rows:
    dlora unpacked    `data.packing: false`, 4 sequences a micro-batch
    dlora packed      `data.packing: true`, the same sequences
    dlora by tokens   packed, `train.tokens_per_micro_batch: 1024`
    trl padded        SFTTrainer, 4 sequences a micro-batch
    trl padding-free  the same, `padding_free`
    trl packed        `packing` into rows of 1024 tokens, one a micro-batch, as many tokens a step
                      (at least one row a rank)
Rows alternate round by round. Figures are each step's own, data and start left out; the first step
of a round is not counted.
"""

from __future__ import annotations

import argparse
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

import numpy as np
import torch
import torch.distributed as dist
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, TrainerCallback
from trl import SFTConfig, SFTTrainer

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from tiny import tokenizer

STEP, MICRO, LONGEST, SHORTEST, R = 16, 4, 1024, 16, 16
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ROWS = (
    "dlora unpacked",
    "dlora packed",
    "dlora by tokens",
    "trl padded",
    "trl padding-free",
    "trl packed",
)


def make_base(directory: Path) -> None:
    """A random Llama, and a tokenizer of one token for each byte."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=2 * LONGEST,
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(directory)
    tokenizer().save_pretrained(directory)


def make_texts(count: int) -> list[str]:
    """Random letters, whose lengths are log-normal: median 120 tokens."""
    drawn = np.random.default_rng(0)
    lengths = np.clip(drawn.lognormal(np.log(120), 0.9, count), SHORTEST, LONGEST - 1)
    return ["".join(map(chr, drawn.integers(97, 123, int(n)))) for n in lengths]


def launched(ranks: int, words: list[str]) -> None:
    """Run a program of Python in one process, or in several ranks."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command = [sys.executable, *(launcher if ranks > 1 else []), *words]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def dlora(
    base: Path, texts: list[str], ranks: int, settings: dict[str, Any]
) -> list[tuple[float, int]]:
    """(seconds, target tokens) of each step of a run."""
    with tempfile.TemporaryDirectory() as directory:
        data, out = Path(directory) / "texts.jsonl", Path(directory) / "run"
        data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        given = {
            "model.path": base,
            "model.dtype": "float32",
            "adapter.r": R,
            "data.train": data,
            "data.format": "text",
            "data.shuffle": "false",
            "optimizer.schedule": "constant",
            "train.max_steps": len(texts) // STEP,
            "train.global_batch_size": STEP,
            "output.dir": out,
            "output.save_every": 0,
            "output.tensorboard": "false",
            "sharding.base": "world",
        } | settings
        words = [word for key, value in given.items() for word in (f"--{key}", str(value))]
        launched(ranks, ["-m", "dlora.train", *words])
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [(line["step_seconds"], line["tokens"]) for line in lines]


class Clock(TrainerCallback):
    """Seconds of each step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._began = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._began = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds.append(time.perf_counter() - self._began)


class Counting(SFTTrainer):
    """Counts the targets of each micro-batch; nothing else is changed."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        counted = self.__dict__.setdefault("targets", [])
        counted.append(int((inputs["labels"][..., 1:] != -100).sum()))
        return super().compute_loss(model, inputs, *args, **kwargs)


def trl(
    base: Path, texts: list[str], ranks: int, settings: dict[str, Any]
) -> list[tuple[float, int]]:
    """(seconds, target tokens of all ranks) of each step of SFTTrainer, in processes of its own."""
    with tempfile.TemporaryDirectory() as directory:
        given, out = Path(directory) / "given.json", Path(directory) / "steps-0.json"
        given.write_text(json.dumps([str(base), texts, ranks, settings]))
        launched(ranks, [__file__, "--trainer", str(given)])
        found = [json.loads(out.with_stem(f"steps-{i}").read_text()) for i in range(ranks)]
    return [(parts[0][0], sum(t for _, t in parts)) for parts in zip(*found, strict=True)]


def train(given: Path) -> None:
    """One rank of `trl`; writes its steps beside `given`."""
    path, texts, ranks, settings = json.loads(given.read_text())
    base = Path(path)
    words, clock = AutoTokenizer.from_pretrained(base), Clock()
    words.pad_token = words.pad_token or words.eos_token
    accumulation = settings.pop("accumulation", max(1, STEP // MICRO // ranks))
    sharded = {"distributed_config": {"fsdp_size": ranks}} if ranks > 1 else {}
    if ranks > 1:
        dist.init_process_group("gloo")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, **sharded)
    with tempfile.TemporaryDirectory() as directory:
        trainer = Counting(
            model=model,
            processing_class=words,
            train_dataset=Dataset.from_dict({"text": texts}),
            peft_config=LoraConfig(r=R, lora_alpha=32, target_modules=TARGETS),
            callbacks=[clock],
            args=SFTConfig(
                output_dir=directory,
                max_steps=len(texts) // STEP,
                gradient_accumulation_steps=accumulation,
                gradient_checkpointing=False,
                learning_rate=2e-4,
                bf16=False,
                use_cpu=True,
                report_to=[],
                save_strategy="no",
                logging_strategy="no",
                disable_tqdm=True,
                **{"per_device_train_batch_size": MICRO, "max_length": LONGEST} | settings,
            ),
        )
        trainer.train()
    counts = trainer.__dict__["targets"]
    each = [sum(counts[k : k + accumulation]) for k in range(0, len(counts), accumulation)]
    steps = list(zip(clock.seconds, each, strict=False))
    given.with_name(f"steps-{os.environ.get('RANK', '0')}.json").write_text(json.dumps(steps))
    if ranks > 1:
        dist.destroy_process_group()


def builders(
    base: Path, texts: list[str], ranks: int
) -> dict[str, Callable[[], list[tuple[float, int]]]]:
    """{row: measures it once}."""
    size = {"train.micro_batch_size": MICRO}
    rows = max(1, round(sum(map(len, texts)) / len(texts) * STEP / LONGEST / ranks))
    packed = {"packing": True, "per_device_train_batch_size": 1, "accumulation": rows}
    by_tokens = {"data.packing": "true", "train.tokens_per_micro_batch": LONGEST}
    free = {"padding_free": True, "max_length": None}
    return {
        "dlora unpacked": lambda: dlora(base, texts, ranks, size | {"data.packing": "false"}),
        "dlora packed": lambda: dlora(base, texts, ranks, size | {"data.packing": "true"}),
        "dlora by tokens": lambda: dlora(base, texts, ranks, by_tokens),
        "trl padded": lambda: trl(base, texts, ranks, {}),
        "trl padding-free": lambda: trl(base, texts, ranks, dict(free)),
        "trl packed": lambda: trl(base, texts, ranks, dict(packed)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--ranks", type=int, default=1, choices=(1, 2, 4))
    parser.add_argument("--trainer", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    args = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    if args.trainer is not None:
        train(args.trainer)
        return
    found: dict[str, list[float]] = {name: [] for name in args.rows}
    with tempfile.TemporaryDirectory() as directory:
        base = Path(directory)
        make_base(base)
        texts = make_texts(args.steps * STEP)
        measure = builders(base, texts, args.ranks)
        for _ in range(args.rounds):
            for name in args.rows:
                steps = measure[name]()[1:]
                seconds, tokens = (sum(part) for part in zip(*steps, strict=True))
                found[name].append(1e3 * seconds / tokens)
                print(f"  {name:<18} {found[name][-1]:.3f}", file=sys.stderr, flush=True)
    reference = found.get("trl padded") or found[args.rows[0]]
    table = [
        {
            "row": name,
            "ms_per_target_token": statistics.median(values),
            "over_trl_padded": statistics.median(
                own / other for own, other in zip(values, reference, strict=True)
            ),
        }
        for name, values in found.items()
    ]
    for row in table:
        print(f"| {row['row']} | {row['ms_per_target_token']:.3f} | {row['over_trl_padded']:.2f} |")
    sharded = f"_{args.ranks}_ranks" if args.ranks > 1 else ""
    target = Path(__file__).with_name(f"mixed_lengths{sharded}.json")
    target.write_text(json.dumps(table, indent=2) + "\n")


if __name__ == "__main__":
    main()
