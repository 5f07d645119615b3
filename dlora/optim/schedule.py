"""Learning-rate schedules as a factor of the optimizer step, so that nothing has to be restored."""

from __future__ import annotations

import math

from torch.optim import Optimizer

SCHEDULES = ("cosine", "linear", "constant")


def lr_factor(schedule: str, step: int, total: int, warmup_ratio: float) -> float:
    """Factor of the base learning rate at optimizer step `step` (0-based) of `total`.

    Rises linearly over w = ⌈warmup_ratio·total⌉ steps, from 0 at the first of them to 1 at the step
    after them, then follows the schedule: `cosine` and `linear` reach 0 after the last step,
    `constant` stays at 1. transformers' schedules give the same. w is at most total − 1, so that
    the last step has a rate above 0 in the shortest of runs.
    """
    warmup = min(math.ceil(warmup_ratio * total), total - 1)
    if step < warmup:
        return step / warmup
    progress = (step - warmup) / max(1, total - warmup)
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    if schedule == "linear":
        return 1 - progress
    return 1.0


def set_lr(optimizer: Optimizer, factor: float) -> float:
    """Scale every group's `initial_lr` by the factor; returns the first group's rate."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor
    return optimizer.param_groups[0]["lr"]
