"""The loss on held-out sequences, the same number on every rank.

    loss = Σ_ranks Σ_batches Σ cross entropy / Σ_ranks Σ_batches targets        in nats per token

Sums are reduced, then divided: a mean of the ranks' means would weigh tokens unequally.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from dlora.data import Dataset, Dealing, Example
from dlora.data.collate import Batch
from dlora.runtime.ranks import Ranks
from dlora.tasks import Task

LARGEST = math.log(1e300)  # beyond which exp is no number that JSON has


@dataclass(frozen=True)
class HeldOut:
    """What a pass over a data set found.

    Attributes:
        figures: `loss`, and those that the task counts.
        tokens: targets, of all ranks.
    """

    figures: dict[str, float]
    tokens: int


def measure(
    task: Task,
    model: nn.Module,
    dataset: Dataset,
    deal: Dealing,
    collate: Callable[[Sequence[Example]], Batch],
    ranks: Ranks,
) -> HeldOut:
    """Measure a model, which is in eval mode without gradients; collective.

    Args:
        deal: makes the micro-batches of ranks.
        collate: makes a batch of one.
    """
    sums = torch.zeros(2 + task.counted, dtype=torch.float64, device=ranks.device)
    for ids in deal(range(len(dataset)), dataset.lengths, ranks.world)[ranks.rank]:
        batch = collate([dataset[i] for i in ids]).to(ranks.device)
        loss, counts = task.evaluate(model, batch)
        sums[0] += loss
        sums[1] += batch.weight
        sums[2:] += counts
    if ranks.world > 1:
        dist.all_reduce(sums)
    figures = {"loss": float(sums[0] / sums[1]), **task.figures(sums[2:])}
    return HeldOut(figures, int(sums[1]))


def perplexity(loss: float) -> float:
    """exp(loss); infinite where that is no number."""
    return math.exp(loss) if loss < LARGEST else math.inf
