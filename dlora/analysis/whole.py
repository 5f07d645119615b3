"""Modules that an adapter trains whole (`modules_to_save`): how far they moved from W0."""

from __future__ import annotations

import math
from typing import Any

import torch

from dlora.analysis.opened import Opened, OpenedBase
from dlora.lora.attach import named_copies

_BLOCK = 1 << 20  # elements


def moved(opened: Opened, base: OpenedBase) -> dict[str, dict[str, Any]]:
    """{parameter: ‖W′ − W0‖ and ‖W0‖}; no W0 where the base lacks it, as a new head."""
    found: dict[str, dict[str, Any]] = {}
    for path, _, copy in named_copies(opened.skeleton):
        for own, _ in copy.named_parameters():
            name = f"{path}.{own}"
            tuned = opened.source.read(f"{copy.place}.{own}").flatten()
            change = before = 0.0
            for start, block in zip(range(0, len(tuned), _BLOCK), tuned.split(_BLOCK), strict=True):
                W = torch.empty(len(block), dtype=torch.float64)
                base.weights.read(name, start, W)
                change += float((block - W).square().sum())
                before += float(W.square().sum())
            is_new = name in base.weights.lacking
            found[name] = {
                "update": math.sqrt(change),
                "base": None if is_new else math.sqrt(before),
            }
    return found
