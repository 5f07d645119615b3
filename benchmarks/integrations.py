"""A step of transformers' and TRL's trainers with dlora, beside dlora's own loop and beside PEFT.

    torchrun --nproc-per-node 2 benchmarks/integrations.py [--rounds 3] [--steps 4] [--kinds sft]

A Llama-shaped model (random weights, 512 wide, 4 blocks), r=16 on all linear layers, W0 sharded
over all ranks, 2 sequences of 128 tokens per rank, AdamW, clip. Rows, of each kind of training:
    loop     dlora's own loop: forward, backward, `reduce_gradients`, clip, step (`trainer` alone)
    dlora    the trainer with dlora's adapters: `DloraTrainer`, `DloraSFTTrainer`, `DloraDPOTrainer`
    resident the same, with all of W0 gathered from its first use on
    peft     the stock trainer, PEFT's adapters, and FSDP2 by transformers' `distributed_config`
Rows alternate round by round; a round is a training of so many steps, of which the first does not
count. Step times are medians, ratios medians of those within a round. Then the bytes of a
checkpoint of the second row, beside what it has to have: A and B, AdamW's two moments, the files of
the tokenizer, 200 kB.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from datasets import Dataset
from peft import LoraConfig as PeftConfig
from peft import get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from dlora import LoraConfig, attach, shard
from dlora.integrations.transformers import DloraTrainer
from dlora.integrations.trl import DloraDPOTrainer, DloraSFTTrainer

SHAPE = {
    "hidden_size": 512,
    "num_hidden_layers": 4,
    "intermediate_size": 1408,
    "vocab_size": 4096,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
}
R, SEQUENCES, TOKENS, RATE, CLIP = 16, 2, 128, 2e-4, 1.0
KINDS = {
    "trainer": (TrainingArguments, Trainer, DloraTrainer),
    "sft": (SFTConfig, SFTTrainer, DloraSFTTrainer),
    "dpo": (DPOConfig, DPOTrainer, DloraDPOTrainer),
}
MOST_BESIDE = 200_000  # bytes of a checkpoint beside adapter, state and tokenizer
Row = Callable[[], list[float]]  # trains, and returns the seconds of its steps


def tokenizer() -> PreTrainedTokenizerFast:
    """A word for each token."""
    special = {"<unk>": 0, "<eos>": 1, "<pad>": 2}
    words = {f"w{index}": index for index in range(3, SHAPE["vocab_size"])}
    core = Tokenizer(models.WordLevel(special | words, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", pad_token="<pad>")


def words(count: int, seed: int) -> str:
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, SHAPE["vocab_size"], (count,), generator=draw)
    return " ".join(f"w{index}" for index in ids.tolist())


def records(kind: str, count: int) -> Any:
    """Sequences of `TOKENS` tokens; for DPO, two for each prompt of half as many."""
    if kind == "dpo":
        half = TOKENS // 2
        rows = [
            {"prompt": words(half, i), "chosen": words(half, -i), "rejected": words(half, i + 1000)}
            for i in range(1, count + 1)
        ]
        return Dataset.from_list(rows)
    if kind == "sft":
        return Dataset.from_list([{"text": words(TOKENS - 1, i)} for i in range(count)])
    encode = tokenizer()
    ids = [torch.tensor(encode(words(TOKENS, i))["input_ids"]) for i in range(count)]
    return [{"input_ids": row, "labels": row} for row in ids]


class Stopwatch(TrainerCallback):
    """Seconds from the end of one step to the end of the next."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.ends.append(time.perf_counter())

    def taken(self) -> list[float]:
        ends, self.ends = self.ends, []
        return [later - one for one, later in zip(ends, ends[1:], strict=False)]


def arguments(kind: str, directory: Path, steps: int) -> Any:
    own = {"max_length": TOKENS} if kind != "trainer" else {}
    return KINDS[kind][0](
        str(directory),
        per_device_train_batch_size=SEQUENCES,
        max_steps=steps,
        learning_rate=RATE,
        max_grad_norm=CLIP,
        logging_steps=steps,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        bf16=False,
        gradient_checkpointing=False,
        **own,
    )


def trainer_row(kind: str, name: str, base: Path, directory: Path, steps: int) -> Any:
    """The trainer of a row, over a model in shards."""
    world = dist.get_world_size()
    _, stock, ours = KINDS[kind]
    config = {"r": R, "lora_alpha": 32, "target_modules": "all-linear"}
    given = {
        "args": arguments(kind, directory, steps),
        "train_dataset": records(kind, world * SEQUENCES * steps),
        "processing_class": tokenizer(),
        "callbacks": [Stopwatch()],
    }
    if name == "peft":
        model = AutoModelForCausalLM.from_pretrained(base, distributed_config={"fsdp_size": world})
        return stock(model=get_peft_model(model, PeftConfig(**config)), **given)
    model = AutoModelForCausalLM.from_pretrained(base)
    resident = 1.0 if name == "resident" else 0.0
    sharding = {"engine": "fsdp2", "base": "world", "resident": resident}
    return ours(model=model, dlora=LoraConfig(**config), sharding=sharding, **given)


def train(trainer: Any) -> list[float]:
    """Train once more from the first step; the seconds of all steps but the first."""
    trainer.train()
    [watch] = [c for c in trainer.callback_handler.callbacks if isinstance(c, Stopwatch)]
    return watch.taken()


def loop_row(base: Path, steps: int) -> Row:
    """dlora's own loop on the batches of the trainer."""
    model = attach(
        AutoModelForCausalLM.from_pretrained(base),
        LoraConfig(r=R, lora_alpha=32, target_modules="all-linear"),
    ).train()
    replica = shard(model, engine="fsdp2", base="world")
    optimizer = torch.optim.AdamW(replica.parameter_groups(lr=RATE), fused=True)
    rank, world = dist.get_rank(), dist.get_world_size()
    rows = records("trainer", world * SEQUENCES * steps)

    def run() -> list[float]:
        ends = []
        for step in range(steps):
            first = (step * world + rank) * SEQUENCES
            own = rows[first : first + SEQUENCES]
            batch = {name: torch.stack([row[name] for row in own]) for name in own[0]}
            model(**batch).loss.backward()
            replica.reduce_gradients()
            replica.clip(CLIP)
            optimizer.step()
            optimizer.zero_grad()
            ends.append(time.perf_counter())
        return [later - one for one, later in zip(ends, ends[1:], strict=False)]

    return run


def checkpoint(trainer: Any, directory: Path) -> dict[str, int]:
    """Bytes of a checkpoint, and of what it has to have. Collective."""
    trainer._save_checkpoint(trainer.model, None)
    dist.barrier()
    trained = 4 * trainer.replica.numel
    [saved] = directory.glob("checkpoint-*")
    own = {file.name: file.stat().st_size for file in saved.rglob("*") if file.is_file()}
    words = sum(own.get(name, 0) for name in ("tokenizer.json", "tokenizer_config.json"))
    return {
        "checkpoint_bytes": sum(own.values()),
        "allowed_bytes": 3 * trained + words + MOST_BESIDE,
        "adapter_bytes": trained,
    }


def measured(kind: str, base: Path, root: Path, steps: int, rounds: int) -> dict[str, Any]:
    """Medians of one kind of training. Collective."""
    trainers = {
        name: trainer_row(kind, name, base, root / f"{kind}-{name}", steps)
        for name in ("dlora", "resident", "peft")
    }
    rows: dict[str, Row] = {"loop": loop_row(base, steps)} if kind == "trainer" else {}
    for name, trainer in trainers.items():
        rows[name] = lambda trainer=trainer: train(trainer)  # type: ignore[misc]
    seconds: dict[str, list[float]] = {name: [] for name in rows}
    for _ in range(rounds):
        for name, row in rows.items():
            dist.barrier()
            seconds[name].append(statistics.median(row()))
    pairs = [("dlora", name) for name in rows if name in ("loop", "peft")]
    over = {
        f"{ours}_over_{other}": statistics.median(
            a / b for a, b in zip(seconds[ours], seconds[other], strict=True)
        )
        for ours, other in (*pairs, ("resident", "peft"))
    }
    medians = {f"{name}_seconds": statistics.median(taken) for name, taken in seconds.items()}
    return {
        "kind": kind,
        **medians,
        **over,
        **checkpoint(trainers["dlora"], root / f"{kind}-dlora"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4, help="of a round, the first uncounted")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--json", type=Path, default=Path(__file__).with_suffix(".json"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    with tempfile.TemporaryDirectory() as made:
        named = torch.tensor(list(made.encode().ljust(256)), dtype=torch.uint8)
        dist.broadcast(named, src=0)
        root = Path(bytes(named.tolist()).decode().strip())
        if dist.get_rank() == 0:
            torch.manual_seed(0)
            LlamaForCausalLM(LlamaConfig(**SHAPE)).save_pretrained(root / "base")
        dist.barrier()
        rows = [measured(k, root / "base", root, args.steps, args.rounds) for k in args.kinds]
        dist.barrier()
    if dist.get_rank() == 0:
        report(rows, args)
    dist.destroy_process_group()


def report(rows: list[dict[str, Any]], args: argparse.Namespace) -> None:
    head = (
        "kind",
        "loop s",
        "dlora s",
        "resident s",
        "peft s",
        "/ loop",
        "/ peft",
        "resident / peft",
        "checkpoint kB",
        "allowed kB",
    )
    print("".join(f"{name:>16}" for name in head))
    for row in rows:
        times = [row.get(f"{name}_seconds") for name in ("loop", "dlora", "resident", "peft")]
        times += [row.get("dlora_over_loop"), row["dlora_over_peft"], row["resident_over_peft"]]
        cells = [row["kind"], *("–" if t is None else f"{t:.3f}" for t in times)]
        cells += [f"{row[name] / 1000:.0f}" for name in ("checkpoint_bytes", "allowed_bytes")]
        print("".join(f"{cell:>16}" for cell in cells))
    summary = {"world": dist.get_world_size(), "rounds": args.rounds, "steps": args.steps}
    args.json.write_text(json.dumps({**summary, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
