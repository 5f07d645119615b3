"""What one rank does in an optimizer step, as far as its bytes depend on it."""

from __future__ import annotations

from dataclasses import dataclass

from dlora.config.load import Config, OptimizerConfig
from dlora.data.collate import PAD_TO


@dataclass(frozen=True)
class Workload:
    """One optimizer step of one rank.

    Attributes:
        rows, tokens: sequences of the largest micro-batch, and their padded length.
        micro_batches: forward passes.
        optimizer: what keeps a state of A and B.
        checkpointing: activations are recomputed in backward.
    """

    rows: int
    tokens: int
    micro_batches: int
    optimizer: OptimizerConfig
    checkpointing: bool


def workload_of(config: Config, world: int, longest: int | None = None) -> Workload:
    """The workload of a run on `world` ranks.

    Args:
        longest: tokens of the data's longest sequence; without data, what `data.max_length` allows.
    """
    sequences, size = config.train.global_batch_size, config.train.micro_batch_size
    micro_batches = -(-sequences // (world * size))
    return Workload(
        rows=-(-sequences // (world * micro_batches)),
        tokens=-(-(longest or config.data.max_length) // PAD_TO) * PAD_TO,
        micro_batches=micro_batches,
        optimizer=config.optimizer,
        checkpointing=config.sharding.activation_checkpointing,
    )
