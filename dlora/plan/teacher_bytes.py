"""What the teacher of a distillation takes of a rank.

W0 itself       one pass more over it in each micro-batch, which gathers what is freed once more
another base    its own share of a rank, and a pass of its own; what it keeps for the step, and
                the last of its blocks, is gathered once in a step
a file          a few tokens of each target
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dlora.config.load import Config
from dlora.data.encode import NO_TARGET
from dlora.objectives.distill import Distill
from dlora.objectives.objective import Objective, objective_of
from dlora.objectives.teachers import OtherBase, OwnBase, TopK, Written
from dlora.plan.taught import Taught
from dlora.plan.teacher import FoundTeacher
from dlora.sharding.comm_bytes import ring_gather_bytes
from dlora.sharding.engines.protocol import engine_class
from dlora.sharding.topology import Placement


@dataclass(frozen=True)
class TeacherBytes:
    """Bytes of a rank for a teacher.

    Attributes:
        held: its share of another base, and its adapter.
        kept: gathered from the first use on until the step ends.
        layers: most that is gathered at one time beside these.
        gathers: sent in an optimizer step.
    """

    held: int = 0
    kept: int = 0
    layers: int = 0
    gathers: float = 0.0


def teacher_bytes(
    found: FoundTeacher | None, placement: Placement, micro_batches: int, at_once: int
) -> TeacherBytes:
    """What a teacher takes of a rank under a placement; nothing without one.

    Args:
        micro_batches: of a step.
        at_once: as of `dlora.plan.memory.Memory`.
    """
    if found is None:
        return TeacherBytes()
    if found.skeleton is None:
        return TeacherBytes(held=found.adapter_bytes)
    groups, size = engine_class(placement).groups(found.skeleton), placement.shard_size
    if size == 1:
        whole = sum(group.nbytes for group in groups)
        return TeacherBytes(held=whole + found.adapter_bytes)
    gathered = [(group.gathered_bytes(size), group.freed and not group.waits) for group in groups]
    freed = sorted((nbytes for nbytes, is_freed in gathered if is_freed), reverse=True)
    kept = sum(nbytes for nbytes, is_freed in gathered if not is_freed)
    share = sum(nbytes for nbytes, _ in gathered) // size
    return TeacherBytes(
        held=share + found.adapter_bytes,
        kept=kept,
        layers=sum(freed[:at_once]),
        gathers=ring_gather_bytes(kept + micro_batches * sum(freed), size),
    )


@dataclass(frozen=True, repr=False)
class TracedObjective:
    """Makes the objective of a run for a trace.

    Attributes:
        found: its teacher, if it has one.
    """

    config: Config
    found: FoundTeacher | None

    def __call__(self, twin_of: Callable[[nn.Module], nn.Module]) -> Objective:
        objective = objective_of(self.config)
        if isinstance(objective, Distill):
            other = self.found.skeleton if self.found is not None else None
            objective.teacher = OwnBase() if other is None else OtherBase(twin_of(other))
            if self.found is not None and self.found.taught is not None:
                objective.teacher = _like(self.found.taught)
        return objective

    def __repr__(self) -> str:
        """Equal for equal traces."""
        found = self.found and self.found.skeleton
        section = getattr(self.config, self.config.train.objective, None)
        return f"{self.config.train.objective} {section} {found and found.config} {found}"


def _like(taught: Taught) -> Written:
    """A teacher with tokens of the shapes that files have, whatever the batch."""

    def tokens(batch: Any) -> TopK:
        shape = int((batch.targets != NO_TARGET).nonzero().shape[0]), taught.about.top_k
        device = batch.targets.device
        ids = torch.zeros(shape, dtype=torch.int64, device=device)
        return TopK(ids, torch.zeros(shape, device=device))

    return Written(tokens)
