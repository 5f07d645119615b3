"""A DPO step beside a supervised one on the same tokens, and beside TRL's.

    torchrun --nproc-per-node 2 benchmarks/preferences.py [--rounds 9]
    python benchmarks/preferences.py --trl [--rounds 9]

`step.py`'s model and adapters, two pairs of 2 x 128 tokens a rank, of which half are the prompt's.
Rows alternate round by round; ratios are medians of those within a round, of wall time and of the
processors' time of all ranks. With W0 over both ranks and whole on each:
    sft         the cross entropy of all four answers
    dpo         policy and reference in one pass over the blocks, one backward
    dpo apart   the reference in a pass of its own
`--trl` is in one process: TRL's `DPOTrainer` with PEFT's adapters beside dlora's step, and the peak
of each in a process of its own, anonymous memory above that after imports.
"""

from __future__ import annotations

import argparse
import json
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
from network import sent_bytes
from rows import R, adamw, base_model

from dlora import LoraConfig, attach, shard
from dlora.data.encode import NO_TARGET, SECOND, Example
from dlora.data.pairs import PairedBatch, collate_pairs
from dlora.objectives.dpo import Dpo, DpoOptions
from dlora.objectives.reference import install_reference
from dlora.runtime.memory import anonymous_bytes
from dlora.tasks.preference import Preference

PAIRS, TOKENS = 2, 128
Step = Callable[[], None]


def batch_of(vocabulary: int, seed: int) -> PairedBatch:
    draw = np.random.default_rng(seed)
    examples = []
    for number in range(PAIRS):
        prompt = draw.integers(3, vocabulary, TOKENS // 2)
        said = [draw.integers(3, vocabulary, TOKENS // 2) for _ in range(2)]
        ids = np.concatenate([prompt, said[0], prompt, said[1]]).astype(np.int32)
        labels = ids.copy()
        for start in (0, TOKENS):
            labels[start : start + TOKENS // 2] = NO_TARGET
        labels[TOKENS] = SECOND
        examples.append(Example(number, ids, labels))
    return collate_pairs(examples, 0)


def row(kind: str, base: str, rank: int) -> Step:
    """A step of dlora's own loop."""
    torch.manual_seed(0)
    model: Any = base_model()
    task, objective = Preference(), Dpo(DpoOptions())
    task.objective = objective
    with torch.device("meta"):
        skeleton = type(model)(model.config)
    task.check(skeleton)
    batch = batch_of(model.config.vocab_size, rank)
    attach(model, LoraConfig(r=R))
    replica = shard(model, base=base)
    task.install(model)
    if kind == "dpo apart":
        for block in model.model.layers:
            del block.forward
        install_reference(model)
    optimizer = adamw(replica)

    def step() -> None:
        if kind == "sft":
            where = {"positions": batch.positions, "lengths": batch.lengths}
            loss = model(**batch.inputs, targets=batch.targets, **where)
            tokens = batch.num_targets
        else:
            loss, tokens = objective.loss(model, batch), batch.weight
        loss.backward()
        replica.reduce_gradients(tokens)
        replica.clip(1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def trl_row(directory: str) -> Step:
    """A step of TRL's trainer, without its loop."""
    from datasets import Dataset
    from integrations import tokenizer
    from peft import LoraConfig as PeftConfig
    from peft import get_peft_model
    from transformers import PreTrainedTokenizerFast
    from trl import DPOConfig, DPOTrainer

    torch.manual_seed(0)
    model: Any = base_model()
    words: PreTrainedTokenizerFast = tokenizer()
    rows = [{"prompt": "w3", "chosen": "w4", "rejected": "w5"}] * 2
    how = {"per_device_train_batch_size": PAIRS, "report_to": [], "use_cpu": True, "bf16": False}
    trainer = DPOTrainer(
        get_peft_model(model, PeftConfig(r=R, lora_alpha=32, target_modules="all-linear")),
        args=DPOConfig(directory, **how),
        train_dataset=Dataset.from_list(rows),
        processing_class=words,
    )
    batch = batch_of(model.config.vocab_size, 0)
    ids = batch.input_ids
    answer = torch.zeros_like(ids)
    answer[:, TOKENS // 2 :] = 1
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "completion_mask": answer}
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    trainer.model.train()

    def step() -> None:
        trainer.compute_loss(trainer.model, dict(inputs)).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def timed(rows: dict[str, Step], rounds: int) -> dict[str, dict[str, list[float]]]:
    """Seconds, processor seconds of all ranks, and bytes on the loopback, of each step."""
    found: dict[str, dict[str, list[float]]] = {
        name: {"seconds": [], "cpu": [], "bytes": []} for name in rows
    }
    joined = dist.is_initialized()
    for number in range(rounds + 2):
        for name, step in rows.items():
            if joined:
                dist.barrier()
            began = time.perf_counter(), time.process_time(), sent_bytes("lo")
            step()
            cpu = torch.tensor(time.process_time() - began[1], dtype=torch.float64)
            seconds, sent = time.perf_counter() - began[0], 0
            if joined:
                dist.barrier()
                sent = sent_bytes("lo") - began[2]
                dist.all_reduce(cpu)
            if number >= 2:  # the first ones warm up
                found[name]["seconds"].append(seconds)
                found[name]["cpu"].append(float(cpu))
                found[name]["bytes"].append(float(sent))
    return found


def over(found: dict[str, Any], one: str, other: str) -> dict[str, float]:
    """Medians of the ratios within rounds."""
    return {
        what: statistics.median(
            a / b for a, b in zip(found[one][what], found[other][what], strict=True) if b
        )
        for what in ("seconds", "cpu", "bytes")
        if all(found[other][what])
    }


def peak_of(name: str) -> int:
    """Of a process of its own."""
    command = [sys.executable, __file__, "--peak", name]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return int(done.stdout.split()[-1])


def peak(name: str) -> int:
    with tempfile.TemporaryDirectory() as directory:
        from trl import DPOTrainer  # noqa: F401 - both processes have imported the same

        before, most = anonymous_bytes(), 0
        step = trl_row(directory) if name == "trl" else row("dpo", "none", 0)

        def sample(*_: Any) -> None:
            nonlocal most
            most = max(most, anonymous_bytes() - before)

        handle = torch.nn.modules.module.register_module_forward_hook(sample)
        for _ in range(3):
            step()
            sample()
        handle.remove()
        return most


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--trl", action="store_true")
    parser.add_argument("--peak", choices=["trl", "dlora"])
    parser.add_argument("--json", type=Path, default=Path(__file__).with_suffix(".json"))
    args = parser.parse_args()
    if args.peak:
        print(peak(args.peak))
        return
    summary = json.loads(args.json.read_text()) if args.json.exists() else {}
    if args.trl:
        with tempfile.TemporaryDirectory() as directory:
            rows = {"trl": trl_row(directory), "dpo": row("dpo", "none", 0)}
            found = timed(rows, args.rounds)
        peaks = {name: peak_of(name) for name in ("trl", "dlora")}
        summary["trl"] = {"dpo / trl": over(found, "dpo", "trl"), "peaks": peaks, "rows": found}
        summary["trl"]["peak / trl"] = peaks["dlora"] / peaks["trl"]
    else:
        dist.init_process_group("gloo")
        rank = dist.get_rank()
        for base in ("world", "none"):
            kinds = ("sft", "dpo", "dpo apart")
            found = timed({kind: row(kind, base, rank) for kind in kinds}, args.rounds)
            ratios = {f"{kind} / sft": over(found, kind, "sft") for kind in kinds[1:]}
            summary[base] = {**ratios, "rows": found}
        dist.destroy_process_group()
        if rank:
            return
    args.json.write_text(json.dumps(summary, indent=2) + "\n")
    for name, part in summary.items():
        print(name, {key: value for key, value in part.items() if key != "rows"})


if __name__ == "__main__":
    main()
