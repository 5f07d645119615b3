"""What one run works on: made once, and the same objects from set-up to exit."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer

from dlora.config.load import Config
from dlora.hooks import Hooks
from dlora.lora.several import DEFAULT
from dlora.methods.trained_replica import TrainedReplica
from dlora.metrics.log import complete
from dlora.runtime.ranks import Ranks
from dlora.runtime.run_lock import RunLock
from dlora.sharding.topology import Topology
from dlora.training.compiled import CompiledBlocks
from dlora.training.find_checkpoint import state_at
from dlora.training.prepare import Preparation
from dlora.training.residents import Residents
from dlora.training.resolved import resolved_yaml
from dlora.training.selection import Selection

# Directories in that of a run.
CHECKPOINTS = "checkpoints"
BEST = "best"  # of the adapter of the best evaluation


class SavedRun(ABC):
    """What saves and resumes a run knows of it: of one adapter, or of several together."""

    config: Config
    ranks: Ranks
    prepared: Any
    replica: Any
    optimizer: Any
    residents: Residents
    lock: RunLock
    hooks: Hooks
    saved_in: Path | None = None

    @property
    def directory(self) -> Path:
        """`output.dir`."""
        return self.config.output.directory

    @property
    def topology(self) -> Topology:
        """Ranks and nodes."""
        return self.prepared.topology

    @property
    def continues(self) -> bool:
        """Whether the run goes on with what lies in `directory`."""
        resumed, own = self.prepared.resumed, self.saved_in or self.directory
        return resumed is not None and resumed.lies_in(own / CHECKPOINTS)

    # -- what a checkpoint has of it ------------------------------------------------------------

    @abstractmethod
    def settings(self) -> str:
        """`config.yaml`."""

    @abstractmethod
    def state(self, step: int) -> dict[str, Any]:
        """`state.json` after `step` optimizer steps."""

    def beside(self) -> dict[str, Any]:
        """The tensors beside the trained ones, and what the adapters' methods record."""
        return {
            "states": self.replica.states(self.optimizer),
            "record": self.replica.method.record(),
            "frozen": self.replica.frozen,
        }

    @abstractmethod
    def write_method_files(self, step: int) -> None:
        """Write the files that the adapters' methods have in the run's directory, up to a step."""

    @abstractmethod
    def complete_metrics(self, record: dict[str, Any]) -> None:
        """Write a step's metrics that are not there."""


@dataclass(frozen=True)
class RunContext(SavedRun):
    """The parts of one run on one rank.

    Attributes:
        residents: the layers of W0 that stay gathered.
        blocks: those of the model as graphs, where the run compiles them.
        objective: what is minimised; of several adapters, the run has it.
        lock: of `directory`; every write there calls its `check` first.
        name: of the adapter, among others.
        saved_in: where its checkpoints lie; None: in `directory`.
        selection: what the run makes of its evaluations.
        decisions: what evaluations have decided of the run, by a key of `state.json` each.
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
    objective: Any = None
    name: str = DEFAULT
    saved_in: Path | None = None
    selection: Selection = field(default_factory=Selection)
    decisions: dict[str, Any] = field(default_factory=dict)

    @property
    def compiles(self) -> bool:
        """Whether blocks run as graphs."""
        return self.blocks is not None and self.blocks.on

    @property
    def eval_every(self) -> int:
        """Steps between evaluations; 0: there are none."""
        measures = self.prepared.eval is not None or self.config.forget.data is not None
        return self.config.output.eval_every if measures else 0

    @property
    def ended_at(self) -> int | None:
        """The step whose adapter is left of a run that ended before its time; None of others."""
        found = (decided.get("ended") for decided in self.decisions.values())
        steps = [ended.get("back", ended["step"]) for ended in found if ended]
        return min(steps, default=None)

    def settings(self) -> str:
        """`config.yaml`."""
        return resolved_yaml(self.config, self.prepared, self.compiles)

    def state(self, step: int) -> dict[str, Any]:
        """`state.json` after `step` optimizer steps."""
        found = self.prepared
        fingerprints = found.train.fingerprint, found.base_identity
        about = (self.config, found.lora, found.sampler, *fingerprints)
        state = state_at(step, *about, found.task.labels, found.train.report.ends)
        teacher = {"teacher": found.teacher.identity} if found.teacher is not None else {}
        state |= {"ranks": self.ranks.world, **teacher}
        return state | self.selection.state() | self.decisions

    def write_method_files(self, step: int) -> None:
        """Write the files that the adapters' method has in the run's directory, up to a step."""
        self.replica.method.write_files(self.directory, until=step)

    def complete_metrics(self, record: dict[str, Any]) -> None:
        """Write a step's line of the metrics unless it is there."""
        complete(self.directory / "metrics.jsonl", record)
