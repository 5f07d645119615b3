"""How fast a step was: tokens per second, in all and per device, and share of the peak (MFU)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dlora.config.load import Config
from dlora.config.recompute import Recompute
from dlora.plan.trace import trace
from dlora.runtime.ranks import Ranks
from dlora.training.prepare import Preparation
from dlora.training.prepare_model import adapted

# Dense bfloat16 operations per second of a device, from the vendors' data sheets, by a part of the
# name that torch reports; the first that fits counts. One that throttles has less.
PEAKS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10G": 70e12,
    "A40": 150e12,
    "MI300X": 1307e12,
    "MI250X": 191.5e12,  # of one of its two dies, which torch shows as a device
}


@dataclass(frozen=True)
class Rates:
    """The rates of a run's steps.

    Args:
        world: ranks, each with a device of its own.
        flops_per_token: operations of forward and backward, without what is recomputed.
        peak: operations per second of one device; with both known there is an `mfu`.
    """

    world: int
    flops_per_token: float | None = None
    peak: float | None = None

    def of(self, tokens: int, all_tokens: int, seconds: float) -> dict[str, float]:
        """The rates of a step of `tokens` target tokens among `all_tokens`, by their names in
        `metrics.jsonl`.

        mfu = all_tokens · flops_per_token / (seconds · world · peak)
        """
        rates = {
            "step_seconds": seconds,
            "tokens_per_second": tokens / seconds,
            "all_tokens_per_second": all_tokens / seconds,
            "all_tokens_per_second_per_device": all_tokens / seconds / self.world,
        }
        if self.flops_per_token and self.peak:
            done = all_tokens * self.flops_per_token
            rates["mfu"] = done / (seconds * self.world * self.peak)
        return rates


def rates(config: Config, ranks: Ranks, prepared: Preparation) -> Rates:
    """The rates of a run; without an `mfu` where the device's peak is not known."""
    peak = None
    if ranks.device.type == "cuda" and config.model.dtype == "bfloat16":
        peak = peak_of(torch.cuda.get_device_name(ranks.device))
    flops = flops_per_token(config, prepared, ranks.device.type) if peak else None
    return Rates(ranks.world, flops, peak)


def peak_of(name: str) -> float | None:
    """Dense bfloat16 operations per second of a device by its name; None: not known."""
    words = name.replace("-", " ").split()
    return next(
        (peak for known, peak in PEAKS.items() if all(word in words for word in known.split())),
        None,
    )


def flops_per_token(config: Config, prepared: Preparation, device: str) -> float:
    """Operations of forward and backward for a token of the run's largest micro-batch.

    All matrix products of the model's own code count, attention's among them, as torch's
    `FlopCounterMode` counts them; W0 has no gradient, so a product with it counts twice, not three
    times. What activation checkpointing computes again does not count.
    """
    work = prepared.budget.workload
    if work.checkpointing:
        skeleton = adapted(config, prepared.task, prepared.base, prepared.resumed).skeleton
        flops = trace(
            skeleton,
            work.rows,
            work.tokens,
            checkpointing=Recompute(),
            targets=work.targets,
            device=device,
            task=prepared.task,
            lengths=work.lengths,
        ).flops
    else:
        flops = prepared.budget.flops // work.micro_batches
    return flops / (work.rows * work.tokens)
