"""What one run works on: made once, and the same objects from set-up to exit."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import nn
from torch.optim import Optimizer

from dlora.config.load import Config
from dlora.hooks import Hooks
from dlora.methods.trained_replica import TrainedReplica
from dlora.runtime.ranks import Ranks
from dlora.runtime.run_lock import RunLock
from dlora.training.compiled import CompiledBlocks
from dlora.training.prepare import Preparation
from dlora.training.residents import Residents


@dataclass(frozen=True)
class RunContext:
    """The parts of one run on one rank.

    Attributes:
        residents: the layers of W0 that stay gathered.
        blocks: those of the model as graphs, where the run compiles them.
        lock: of `directory`; every write there calls its `check` first.
    """

    config: Config
    ranks: Ranks
    prepared: Preparation
    model: nn.Module
    replica: TrainedReplica
    residents: Residents
    optimizer: Optimizer
    lock: RunLock
    hooks: Hooks
    blocks: CompiledBlocks | None = None

    @property
    def compiles(self) -> bool:
        """Whether blocks run as graphs."""
        return self.blocks is not None and self.blocks.on

    @property
    def directory(self) -> Path:
        """`output.dir`."""
        return self.config.output.directory
