"""What measuring forgetting costs beside a plain evaluation of the same texts.

    python -m torch.distributed.run --nproc-per-node 2 benchmarks/forgetting.py [--rounds 5]

The demo model with an adapter on all linear layers. In each round a held-out evaluation of the
retained set, and the measurement of it with the adapter off and on; seconds are those of this
rank's processors, so that other work on the machine counts little, and of the clock.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from runs import ROOT

from dlora.config.load import parse
from dlora.data.builtin import builtin_records
from dlora.runtime.memory import MemoryMeter
from dlora.train import Run, planned
from dlora.training.evaluate import held_out
from dlora.training.startup import enter, lock_output


def texts(directory: str, count: int) -> Path:
    """A file of held-out pairs, the same on every rank."""
    path = Path(directory) / "retained.jsonl"
    records = builtin_records("builtin:docstrings-heldout")
    some = [json.dumps(record) for record, _ in zip(records, range(count), strict=False)]
    path.write_text("\n".join(some) + "\n")
    return path


def words(directory: str, base: str, count: int) -> list[str]:
    """The command line of the run."""
    data = str(texts(directory, count))
    given: dict[str, Any] = {
        "data.eval": data,
        "forget.data": data,
        "sharding.base": base,
        "output.dir": f"{directory}/run",
        "output.samples": 0,
        "output.eval_every": 1,
        "data.max_eval_samples": "null",
        "train.compile": "false",
    }
    config = ["--config", str(ROOT / "configs" / "quickstart.yaml")]
    return config + [word for key, value in given.items() for word in (f"--{key}", str(value))]


def timed(work: Callable[[], Any]) -> tuple[float, float]:
    """(seconds of this process's processors, seconds of the clock)."""
    if dist.is_initialized():
        dist.barrier()
    began = time.process_time(), time.perf_counter()
    work()
    return time.process_time() - began[0], time.perf_counter() - began[1]


def measured(run: Run, rounds: int) -> dict[str, Any]:
    """Medians over rounds, which alternate."""
    with torch.no_grad():  # so that the update is not 0
        for name, parameter in run.replica.named.items():
            generator = torch.Generator().manual_seed(len(name))
            noise = torch.randn(parameter.shape, generator=generator) * 1e-2
            parameter.add_(noise.to(parameter.device))
    plain, both = [], []
    for _ in range(rounds + 1):
        plain.append(timed(lambda: held_out(run.context)))
        both.append(timed(run.forgetting.measure))
    pairs = list(zip(plain[1:], both[1:], strict=True))
    found = run.forgetting.measure()
    return {
        "plain_cpu": median(p[0] for p, _ in pairs),
        "both_cpu": median(b[0] for _, b in pairs),
        "ratio_cpu": median(b[0] / p[0] for p, b in pairs),
        "ratio_clock": median(b[1] / p[1] for p, b in pairs),
        "tokens": found.tokens,
        "kl": found.kl,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--texts", type=int, default=16)
    parser.add_argument("--base", default="world")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    directory = Path(tempfile.gettempdir()) / "forgetting"
    directory.mkdir(exist_ok=True)
    argv = words(str(directory), options.base, options.texts)
    ranks, _ = enter(argv, prog="benchmark", first=lambda: None)
    config = parse(argv, prog="benchmark").config
    lock = lock_output(config, ranks)
    try:
        preparation = planned(config, ranks)
        ranks.join(600)
        run = Run(config, ranks, preparation, MemoryMeter(), lock)
        row = {"ranks": ranks.world, "base": options.base} | measured(run, options.rounds)
        run.checkpoints.close()
        if ranks.main:
            print(json.dumps(row, indent=2))
            if options.json is not None:
                rows = json.loads(options.json.read_text()) if options.json.exists() else []
                options.json.write_text(json.dumps([*rows, row], indent=2) + "\n")
        ranks.leave()
    finally:
        lock.release()


if __name__ == "__main__":
    main()
