"""Rows of a benchmark side by side: built, warmed up, then timed in turn, round by round."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist
from network import sent_bytes
from rows import Row
from torch import nn

from dlora.runtime.memory import anonymous_bytes, trim


def alternate(
    rows: Mapping[str, Row], rounds: int
) -> tuple[dict[str, list[float]], dict[str, list[int]]]:
    """Seconds of each step, and bytes that all ranks together sent in it, by row."""
    seconds: dict[str, list[float]] = {name: [] for name in rows}
    sent: dict[str, list[int]] = {name: [] for name in rows}
    for _ in range(rounds):
        for name, row in rows.items():
            taken, nbytes = measure(row.step)
            seconds[name].append(taken)
            sent[name].append(nbytes)
    return seconds, sent


def measure(step: Callable[[], None]) -> tuple[float, int]:
    """(seconds, bytes on the loopback of all ranks) of one step, started together."""
    dist.barrier()
    before, began = sent_bytes("lo"), time.perf_counter()
    step()
    seconds = time.perf_counter() - began
    dist.barrier()
    return seconds, sent_bytes("lo") - before


def peak_memory(build: Callable[[torch.Tensor], Row], batch: torch.Tensor) -> tuple[Row, int]:
    """Build a row and run it three times; most anonymous bytes above those before, sampled."""
    gc.collect()
    trim()
    before, row = anonymous_bytes(), build(batch)
    peak = 0
    hooks = []

    def sample(*_: object) -> None:
        nonlocal peak
        peak = max(peak, anonymous_bytes() - before)

    handle = nn.modules.module.register_module_forward_hook(sample)
    hooks.append(handle)
    for _ in range(3):
        row.step()
        sample()
    for handle in hooks:
        handle.remove()
    return row, peak
