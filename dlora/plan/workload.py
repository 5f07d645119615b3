"""What one rank does in an optimizer step, as far as its bytes depend on it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from dlora.config.load import Config, OptimizerConfig
from dlora.config.recompute import Recompute, ways
from dlora.data import Dataset, Sampler, deal
from dlora.data.collate import PAD_TO
from dlora.data.encode import count_targets
from dlora.tasks import TASKS

EXACT_SEQUENCES = 50_000  # up to so many every micro-batch of a run is measured, in about a second


@dataclass(frozen=True)
class Workload:
    """One optimizer step of one rank.

    Attributes:
        rows, tokens: sequences of the largest micro-batch, and their padded length.
        micro_batches: forward passes.
        optimizer: the `optimizer` section.
        checkpointing: which activations are recomputed in backward.
        targets: most target tokens of a micro-batch; None: every token may be one.
    """

    rows: int
    tokens: int
    micro_batches: int
    optimizer: OptimizerConfig
    checkpointing: Recompute
    targets: int | None = None


def workload_of(
    config: Config, world: int, data: Dataset | None = None, sampler: Sampler | None = None
) -> Workload:
    """The workload of a run on `world` ranks.

    Args:
        data, sampler: what the run trains on, and in which order. Without them every sequence may
            have `data.max_length` tokens, all of them targets.
    """
    sequences, size = config.train.global_batch_size, config.train.micro_batch_size
    micro_batches = -(-sequences // (world * size))
    rows = -(-sequences // (world * micro_batches))
    longest = config.data.max_length * TASKS[config.train.task].longest
    tokens, targets = _padded(longest), None
    if data is not None and sampler is not None:
        if sampler.sequences(sampler.total_steps) <= EXACT_SEQUENCES:
            rows, tokens, targets = _largest_micro_batch(data, sampler, world, size)
        else:  # then one of the longest sequences alone is likely to come
            tokens = _padded(data.report.longest)
    return Workload(
        rows=rows,
        tokens=tokens,
        micro_batches=micro_batches,
        optimizer=config.optimizer,
        checkpointing=next(ways(config.sharding.activation_checkpointing, "")),
        targets=targets,
    )


def _largest_micro_batch(
    data: Dataset, sampler: Sampler, world: int, size: int
) -> tuple[int, int, int]:
    """(rows, padded tokens) of the run's largest micro-batch, and most targets of any."""
    lengths, rows, tokens, most = data.lengths, 1, PAD_TO, 0
    targets_of = cache(lambda i: count_targets(data[i].labels))
    for step in range(sampler.total_steps):
        for micros in deal(sampler.step(step), lengths, world, size):
            for ids in filter(None, micros):
                padded = _padded(max(int(lengths[i]) for i in ids))
                if len(ids) * padded > rows * tokens:
                    rows, tokens = len(ids), padded
                most = max(most, sum(map(targets_of, ids)))
    return rows, tokens, most


def _padded(tokens: int) -> int:
    return -(-tokens // PAD_TO) * PAD_TO
