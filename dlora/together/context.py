"""What a run of several adapters works on, as its checkpoints see it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from dlora.config.load import Config
from dlora.config.members import ADAPTERS
from dlora.hooks import Hooks
from dlora.runtime.ranks import Ranks
from dlora.runtime.run_lock import RunLock
from dlora.together.member import Member
from dlora.together.prepare import JointPreparation
from dlora.together.replicas import Optimizers, Replicas
from dlora.training.context import SavedRun
from dlora.training.residents import Residents
from dlora.training.resolved import resolved_yaml


@dataclass(frozen=True)
class JointContext(SavedRun):
    """The parts of a run of several adapters on one rank; as `RunContext` where both have a part.

    Attributes:
        members: the adapters, each with the context of a run of its own.
    """

    config: Config
    ranks: Ranks
    prepared: JointPreparation
    model: nn.Module
    replica: Replicas
    residents: Residents
    optimizer: Optimizers
    lock: RunLock
    hooks: Hooks
    members: list[Member]

    def settings(self) -> str:
        """`config.yaml`."""
        return resolved_yaml(self.config, self.prepared.first, compiles=False)

    def state(self, step: int) -> dict[str, Any]:
        """`state.json`: of each adapter what a run of its own writes, and how it stands."""
        own = {
            member.name: member.context.state(min(step, member.total_steps))
            | {"standing": member.standing.value}
            | ({"why": member.why} if member.why else {})
            for member in self.members
        }
        total = self.prepared.total_steps
        return {
            "step": step,
            "total_steps": total,
            "ranks": self.ranks.world,
            ADAPTERS: own,
        }

    def write_method_files(self, step: int) -> None:
        """Write the files that the methods have in their adapters' directories, up to a step."""
        for member in self.members:
            if member.running:
                member.context.write_method_files(step)

    def complete_metrics(self, record: dict[str, Any]) -> None:
        """Write the lines of a step's metrics, {name: line}, that are not there."""
        for member in self.members:
            if member.name in record:
                member.context.complete_metrics(record[member.name])
