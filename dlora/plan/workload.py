"""What one rank does in an optimizer step, as far as its bytes depend on it."""

from __future__ import annotations

from dataclasses import dataclass

from dlora.config import Config
from dlora.data.collate import PAD_TO

MOMENTS = {"adamw": 2, "sgd": 0}  # float32 values that an optimizer keeps per parameter


@dataclass(frozen=True)
class Workload:
    """One optimizer step of one rank.

    Attributes:
        rows, tokens: sequences of the largest micro-batch, and their padded length.
        micro_batches: forward passes.
        moments: values that the optimizer keeps per element that it steps.
        checkpointing: activations are recomputed in backward.
    """

    rows: int
    tokens: int
    micro_batches: int
    moments: int
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
        moments=MOMENTS[config.optimizer.name],
        checkpointing=config.sharding.activation_checkpointing,
    )
