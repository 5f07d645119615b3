"""What AdaLoRA kept: the rank of every module, of the rank that it began with.

a checkpoint        its triplets that are not 0
a run's adapter     `ranks.json` beside it, whose last mask it was cut by; else its own ranks,
                    where modules that lost all are not listed
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import mean
from typing import Any

import yaml

from dlora.analysis.opened import Opened
from dlora.analysis.summary import groups
from dlora.methods.adalora_report import read_masks


@dataclass(frozen=True)
class Kept:
    """Ranks by module, of `init_r` each."""

    init_r: int
    ranks: dict[str, int]

    @property
    def kept(self) -> int:
        """Triplets that are left."""
        return sum(self.ranks.values())

    @property
    def of(self) -> int:
        """Triplets at the start."""
        return self.init_r * len(self.ranks)

    def means(self, which: int) -> dict[str, float]:
        """The mean rank of each kind (0) or layer (1), modules without rank included."""
        return {
            group: mean(self.ranks[path] for path in own)
            for group, own in groups(self.ranks, which).items()
        }

    def record(self) -> dict[str, Any]:
        """As JSON."""
        sums = {"init_r": self.init_r, "kept": self.kept, "of": self.of}
        return {**sums, "kinds": self.means(0), "layers": self.means(1), "ranks": self.ranks}


def kept_by(opened: Opened, ranks: Mapping[str, int]) -> Kept | None:
    """What AdaLoRA kept; None: the adapter is not known to be of an AdaLoRA run.

    Args:
        ranks: r of every module in the adapter.
    """
    source = opened.source
    if source.is_checkpoint:
        init_r = getattr(source.config, "init_r", None)
        return None if init_r is None else Kept(init_r, dict(ranks))
    run = source.directory.parent
    init_r = _init_r(run)
    if init_r is None:
        return None
    masks = read_masks(run, until=sys.maxsize)
    last = masks[max(masks)] if masks else {}
    pruned = {path: 0 for path, rank in last.items() if not rank and path not in ranks}
    order = [path for path in last if path in pruned or path in ranks] or list(ranks)
    rest = [path for path in ranks if path not in order]
    return Kept(init_r, {path: ranks.get(path, 0) for path in [*order, *rest]})


def _init_r(run: Any) -> int | None:
    """`adapter.init_r` of a run with AdaLoRA."""
    try:
        adapter = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))["adapter"]
        found = adapter["init_r"] if adapter["method"] == "adalora" else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError, yaml.YAMLError):
        return None
    return found if type(found) is int and found > 0 else None
