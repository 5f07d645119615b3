"""What one run works on: made once, and the same objects from set-up to exit."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

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

CHECKPOINTS = "checkpoints"  # the directory in that of a run


class SavedRun(Protocol):
    """What saves and resumes a run knows of it: of one adapter, or of several together."""

    @property
    def config(self) -> Config: ...

    @property
    def ranks(self) -> Ranks: ...

    @property
    def prepared(self) -> Any: ...

    @property
    def replica(self) -> Any: ...

    @property
    def optimizer(self) -> Any: ...

    @property
    def lock(self) -> RunLock: ...

    @property
    def hooks(self) -> Hooks: ...

    @property
    def directory(self) -> Path: ...

    @property
    def topology(self) -> Topology: ...

    @property
    def continues(self) -> bool: ...

    def settings(self) -> str: ...

    def state(self, step: int) -> dict[str, Any]: ...

    def beside(self) -> dict[str, Any]: ...

    def write_method_files(self, step: int) -> None: ...

    def complete_metrics(self, record: dict[str, Any]) -> None: ...


@dataclass(frozen=True)
class RunContext:
    """The parts of one run on one rank.

    Attributes:
        residents: the layers of W0 that stay gathered.
        blocks: those of the model as graphs, where the run compiles them.
        objective: what is minimised; of several adapters, the run has it.
        lock: of `directory`; every write there calls its `check` first.
        name: of the adapter, among others.
        saved_in: where its checkpoints lie; None: in `directory`.
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

    @property
    def compiles(self) -> bool:
        """Whether blocks run as graphs."""
        return self.blocks is not None and self.blocks.on

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
        return state | {"ranks": self.ranks.world, **teacher}

    def beside(self) -> dict[str, Any]:
        """The tensors beside the trained ones, and what the adapters' method records."""
        return {
            "states": self.replica.states(self.optimizer),
            "record": self.replica.method.record(),
            "frozen": self.replica.frozen,
        }

    def write_method_files(self, step: int) -> None:
        """Write the files that the adapters' method has in the run's directory, up to a step."""
        self.replica.method.write_files(self.directory, until=step)

    def complete_metrics(self, record: dict[str, Any]) -> None:
        """Write a step's line of the metrics unless it is there."""
        complete(self.directory / "metrics.jsonl", record)
