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
        rows, tokens: of the largest micro-batch, padded.
        micro_batches: forward passes.
        optimizer: the `optimizer` section.
        checkpointing: which activations are recomputed in backward.
        targets: most target tokens of a micro-batch; None: every token may be one.
        lengths: of the sequences that share its one row; empty: each has a row of its own.
    """

    rows: int
    tokens: int
    micro_batches: int
    optimizer: OptimizerConfig
    checkpointing: Recompute
    targets: int | None = None
    lengths: tuple[int, ...] = ()

    def __str__(self) -> str:
        packed = f" ({len(self.lengths)} sequences)" if self.lengths else ""
        return f"{self.rows} x {self.tokens} tokens{packed}"


def workload_of(
    config: Config,
    world: int,
    data: Dataset | None = None,
    sampler: Sampler | None = None,
    *,
    packs: bool = False,
) -> Workload:
    """The workload of a run on `world` ranks.

    Args:
        data, sampler: what the run trains on, and in which order. Without them every sequence may
            have `data.max_length` tokens, all of them targets.
        packs: whether the sequences of a micro-batch share a row.
    """
    sequences, size = config.train.global_batch_size, config.train.micro_batch_size
    micro_batches = -(-sequences // (world * size))
    rows = -(-sequences // (world * micro_batches))
    longest = config.data.max_length * TASKS[config.train.task].longest
    lengths, targets = (longest,) * rows, None
    if data is not None and sampler is not None:
        if sampler.sequences(sampler.total_steps) <= EXACT_SEQUENCES:
            lengths, targets = _largest_micro_batch(data, sampler, world, size, packs)
        else:  # then one of the longest sequences alone is likely to come
            lengths = (data.report.longest,) * rows
    shared = packs and len(lengths) > 1
    return Workload(
        rows=1 if shared else len(lengths),
        tokens=_padded(sum(lengths) if shared else max(lengths)),
        micro_batches=micro_batches,
        optimizer=config.optimizer,
        checkpointing=next(ways(config.sharding.activation_checkpointing, "")),
        targets=targets,
        lengths=lengths if shared else (),
    )


def _largest_micro_batch(
    data: Dataset, sampler: Sampler, world: int, size: int, packs: bool
) -> tuple[tuple[int, ...], int]:
    """Lengths of the sequences of the run's largest micro-batch, and most targets of any."""
    lengths, largest, places, most = data.lengths, (PAD_TO,), PAD_TO, 0
    targets_of = cache(lambda i: count_targets(data[i].labels))
    for step in range(sampler.total_steps):
        for micros in deal(sampler.step(step), lengths, world, size):
            for ids in filter(None, micros):
                these = tuple(int(lengths[i]) for i in ids)
                size_of = _padded(sum(these)) if packs else len(these) * _padded(max(these))
                if size_of > places:
                    largest, places = these, size_of
                most = max(most, sum(map(targets_of, ids)))
    return largest, most


def _padded(tokens: int) -> int:
    return -(-tokens // PAD_TO) * PAD_TO
