"""Runs of `dlora.train` that a benchmark compares: made once, finished where they were stopped."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parent.parent


def options(file: str, changes: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The options of a file in `configs/` with some of its sections' keys replaced."""
    config = yaml.safe_load((ROOT / "configs" / file).read_text())
    for section, values in changes.items():
        config[section] = {**config.get(section, {}), **values}
    return config


def train(config: dict[str, Any], ranks: int) -> list[dict[str, Any]]:
    """Make a run or go on with it; the lines of its metrics."""
    directory = Path(config["output"]["dir"])
    directory.parent.mkdir(parents=True, exist_ok=True)
    file = directory.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(config, sort_keys=False))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*launcher, f"--nproc-per-node={ranks}", "-m", "dlora.train", "--config", str(file)]
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def held_out(lines: list[dict[str, Any]]) -> tuple[float, float]:
    """(loss before, loss after) on what was held out."""
    losses = [line["eval_loss"] for line in lines if line.get("eval_loss") is not None]
    return losses[0], losses[-1]


def rows_of(file: Path) -> list[dict[str, Any]]:
    """The rows that a JSON file has already."""
    return json.loads(file.read_text()) if file.exists() else []
