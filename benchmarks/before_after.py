"""A step of an earlier commit beside the same step of this one, in one run.

    git worktree add --detach ../before COMMIT
    python benchmarks/before_after.py --before ../before [--rounds 9] [--pause 0]

Two ranks of each tree wait side by side; in each round they do one step of each row in turn, the
earlier tree first in even rounds and last in odd ones. CPU seconds are those of both ranks, which a
machine with other work on it changes least; ratios are medians of the per-round ratios.
    lora, dora          one micro-batch
    … dropout           with dropout 0.05, its masks keyed by step and sequence as in a run
    … accumulation 4    four micro-batches
    … sharded           W0 under FSDP2 over both ranks
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
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

ROWS: dict[str, dict[str, Any]] = {
    "lora": {},
    "lora, dropout": {"dropout": 0.05},
    "lora, accumulation 4": {"accumulation": 4},
    "lora, accumulation 4, sharded": {"accumulation": 4, "base": "world"},
    "dora": {"dora": True},
    "dora, dropout": {"dora": True, "dropout": 0.05},
    "dora, accumulation 4": {"dora": True, "accumulation": 4},
}
SHAPE = {
    "hidden_size": 512,
    "num_hidden_layers": 2,
    "intermediate_size": 1408,
    "vocab_size": 8000,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
}
RANKS, SEQUENCES, TOKENS, R, WARM = 2, 2, 128, 16, 2
SEED = 0


def row(
    rank: int,
    *,
    dropout: float = 0.0,
    accumulation: int = 1,
    base: str = "none",
    dora: bool = False,
) -> Callable[[], None]:
    """A step as a run does it, in what both trees have."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from dlora import LoraConfig, attach, shard
    from dlora.lora.attach import attachment_of
    from dlora.lora.dropout import SampleKeys

    torch.manual_seed(SEED)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE)).to(torch.bfloat16).train()
    attach(model, LoraConfig(r=R, lora_dropout=dropout, use_dora=dora))
    replica = shard(model, base=base)
    optimizer = torch.optim.AdamW(replica.parameter_groups(lr=1e-4), fused=True)
    drawn = torch.Generator().manual_seed(rank)
    batch = torch.randint(SHAPE["vocab_size"], (SEQUENCES, TOKENS), generator=drawn)
    attached: Any = attachment_of(model)
    lengths = (TOKENS,) * SEQUENCES
    steps = [0]

    def step() -> None:
        shared = getattr(attached, "values", None)  # what all passes of a step have in common
        with shared.shared() if shared is not None else nullcontext():
            for micro in range(accumulation):
                ids = tuple(range(micro * SEQUENCES, (micro + 1) * SEQUENCES))
                with attached.stream.keyed(SampleKeys(SEED, steps[0], ids, lengths)):
                    model(input_ids=batch, labels=batch, use_cache=False).loss.backward()
        replica.reduce_gradients()
        replica.clip(1.0)
        optimizer.step()
        replica.zero_grad() if hasattr(replica, "zero_grad") else optimizer.zero_grad()
        steps[0] += 1

    return step


def serve(rank: int, store: str) -> None:
    """A rank: does a step of the row that each line of its input names, and says how long."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    answers, sys.stdout = sys.stdout, sys.stderr
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(RANKS), LOCAL_WORLD_SIZE=str(RANKS))
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    steps = {name: row(rank, **settings) for name, settings in ROWS.items()}
    for name in ROWS:
        for _ in range(WARM):
            steps[name]()
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        dist.barrier()
        wall, cpu = time.perf_counter(), time.process_time()
        steps[line.strip()]()
        taken = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
        print(json.dumps(taken), file=answers, flush=True)


class Tree:
    """The ranks of one tree."""

    def __init__(self, path: Path, directory: Path) -> None:
        self.commit = subprocess.check_output(
            ["git", "-C", str(path), "rev-parse", "--short", "HEAD"], text=True
        ).strip()
        store = directory / f"store-{self.commit}-{path.name}"
        environment = os.environ | {"PYTHONPATH": str(path), "OMP_NUM_THREADS": "1"}
        pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.ranks = [
            subprocess.Popen(
                [sys.executable, __file__, "--serve", str(rank), "--store", str(store)],
                env=environment,
                **pipes,
            )
            for rank in range(RANKS)
        ]

    def wait(self) -> None:
        for rank in self.ranks:
            if self._line(rank) != "ready":
                sys.exit(f"a rank of {self.commit} did not start")

    def step(self, name: str) -> dict[str, float]:
        """Seconds of the slower rank, and CPU seconds of both."""
        for rank in self.ranks:
            assert rank.stdin is not None
            rank.stdin.write(f"{name}\n")
            rank.stdin.flush()
        found = [json.loads(self._line(rank)) for rank in self.ranks]
        return {"wall": max(f["wall"] for f in found), "cpu": sum(f["cpu"] for f in found)}

    def close(self) -> None:
        for rank in self.ranks:
            assert rank.stdin is not None
            rank.stdin.close()
            rank.wait()

    @staticmethod
    def _line(rank: Any) -> str:
        return rank.stdout.readline().strip()


def compared(
    before: Tree, after: Tree, rounds: int, pause: float
) -> Iterator[list[dict[str, Any]]]:
    """The table after each round."""
    seen: dict[str, list[tuple[dict[str, float], dict[str, float]]]] = {name: [] for name in ROWS}
    for turn in range(rounds):
        for name in ROWS:
            if turn % 2:
                later = after.step(name)
                seen[name].append((before.step(name), later))
            else:
                seen[name].append((before.step(name), after.step(name)))
        yield table_of(seen)
        time.sleep(pause)


def table_of(seen: dict[str, Any]) -> list[dict[str, Any]]:
    """Medians of each row, and of its ratios."""
    table = []
    for name, pairs in seen.items():
        line: dict[str, Any] = {"row": name}
        for clock in ("wall", "cpu"):
            line[f"{clock}_before"] = statistics.median(b[clock] for b, _ in pairs)
            line[f"{clock}_after"] = statistics.median(a[clock] for _, a in pairs)
            line[f"{clock}_ratio"] = statistics.median(a[clock] / b[clock] for b, a in pairs)
        ratios = sorted(a["cpu"] / b["cpu"] for b, a in pairs)
        line["cpu_ratio_range"] = [ratios[0], ratios[-1]]
        table.append(line)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--before", type=Path, help="a checkout of the earlier commit")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--pause", type=float, default=0.0, help="seconds between rounds")
    parser.add_argument("--json", type=Path, default=Path(__file__).with_suffix(".json"))
    parser.add_argument("--serve", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--store", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve is not None:
        serve(args.serve, args.store)
        return
    if args.before is None:
        parser.error("--before: name a checkout of the earlier commit")
    here = Path(__file__).resolve().parent.parent
    with tempfile.TemporaryDirectory() as directory:
        trees = [Tree(path.resolve(), Path(directory)) for path in (args.before, here)]
        for tree in trees:
            tree.wait()
        commits = {"before": trees[0].commit, "after": trees[1].commit}
        for turn, table in enumerate(compared(*trees, args.rounds, args.pause), 1):
            found = {**commits, "rounds": turn, "rows": table}
            args.json.write_text(json.dumps(found, indent=2) + "\n")
        for tree in trees:
            tree.close()
    print(f"{'row':32}{'CPU s before':>13}{'after':>8}{'ratio':>7}{'wall':>7}")
    for line in table:
        print(
            f"{line['row']:32}{line['cpu_before']:13.2f}{line['cpu_after']:8.2f}"
            f"{line['cpu_ratio']:7.3f}{line['wall_ratio']:7.3f}"
        )


if __name__ == "__main__":
    main()
