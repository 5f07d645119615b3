"""Learning rates at every step against transformers' schedulers."""

import math

import pytest
import torch
from torch import nn
from transformers import (
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
    get_linear_schedule_with_warmup,
)

from dlora.optim.schedule import SCHEDULES, lr_factor, set_lr

LR = 3e-4


def reference(schedule: str, total: int, warmup: int) -> list[float]:
    """What transformers' scheduler sets for each of the `total` optimizer steps."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=LR)
    if schedule == "constant":
        scheduler = get_constant_schedule_with_warmup(optimizer, warmup)
    elif schedule == "linear":
        scheduler = get_linear_schedule_with_warmup(optimizer, warmup, total)
    else:
        scheduler = get_cosine_schedule_with_warmup(optimizer, warmup, total)
    rates = []
    for _ in range(total):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize("warmup_ratio", [0.0, 0.03, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("total", [1, 2, 7, 100, 133])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_rates_equal_transformers(schedule: str, total: int, warmup_ratio: float) -> None:
    expected = reference(schedule, total, min(math.ceil(warmup_ratio * total), total - 1))
    actual = [LR * lr_factor(schedule, step, total, warmup_ratio) for step in range(total)]
    assert actual == pytest.approx(expected, rel=1e-12, abs=1e-18)


@pytest.mark.parametrize(("schedule", "end"), [("cosine", 0), ("linear", 0), ("constant", 1)])
def test_a_schedule_starts_peaks_and_ends_where_it_says(schedule: str, end: float) -> None:
    assert lr_factor(schedule, 0, 100, 0.1) == 0
    assert lr_factor(schedule, 10, 100, 0.1) == 1
    assert lr_factor(schedule, 100, 100, 0.1) == pytest.approx(end, abs=1e-15)


@pytest.mark.parametrize("warmup_ratio", [0.0, 0.03, 1.0])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_shortest_runs_learn(schedule: str, warmup_ratio: float) -> None:
    assert lr_factor(schedule, 0, 1, warmup_ratio) == 1
    assert lr_factor(schedule, 1, 2, warmup_ratio) > 0


def test_every_group_is_scaled_from_its_own_rate() -> None:
    """LoRA+ keeps its ratio at every step, and a second call does not compound."""
    groups = [
        {"params": [nn.Parameter(torch.zeros(1))], "lr": rate, "initial_lr": rate}
        for rate in (1e-3, 1.6e-2)
    ]
    optimizer = torch.optim.SGD(groups)
    for factor in (0.5, 0.25):
        assert set_lr(optimizer, factor) == 1e-3 * factor
        assert [g["lr"] for g in optimizer.param_groups] == [1e-3 * factor, 1.6e-2 * factor]
