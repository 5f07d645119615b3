"""What is planned for, and a plan: one placement of one model on some ranks, in bytes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from dlora.config.recompute import Recompute
from dlora.plan.gathers import Unit, units_of
from dlora.plan.memory import AT_ONCE, Memory, memory_of
from dlora.plan.method import method_plan, offset_bytes, offsets_of
from dlora.plan.teacher import FoundTeacher
from dlora.plan.teacher_bytes import TracedObjective, teacher_bytes
from dlora.plan.trace import trace
from dlora.plan.traffic import Traffic, traffic_of
from dlora.plan.workload import Workload
from dlora.sharding.engines.gather_groups import frozen_groups, worth_holding
from dlora.sharding.engines.protocol import engine_class
from dlora.sharding.topology import Placement, Topology
from dlora.tasks import CAUSAL, Task


@dataclass(frozen=True)
class Plan:
    """One placement and what it costs each rank.

    Attributes:
        divided: whether the optimizer state is divided over ranks.
        resident: paths of the layers that stay gathered from their first use on.
        trainable: number of parameters in A, B and trained copies.
        spared: bytes that a rank sends less per step because of `resident`.
        flops: of a rank in an optimizer step whose micro-batches are all the largest.
    """

    placement: Placement
    topology: Topology
    divided: bool
    resident: tuple[str, ...]
    trainable: int
    flops: int
    workload: Workload
    memory: Memory
    traffic: Traffic
    spared: int = 0

    @property
    def base_total(self) -> int:
        """Bytes of W0, once."""
        return self.memory.base_total

    @property
    def base_held(self) -> int:
        """Bytes of W0 on a rank between steps, once resident layers are gathered."""
        return self.memory.base_held + self.memory.resident

    @property
    def gathers(self) -> int:
        """Bytes that a rank sends per optimizer step in gathers of W0, in steady state."""
        return round(self.traffic.gathers.rank)

    @property
    def reduction(self) -> int:
        """Bytes that a rank sends per optimizer step to reduce gradients."""
        return round(self.traffic.reduction.rank)

    @property
    def audit(self) -> int:
        """Bytes that a rank sends to compare checksums."""
        return round(self.traffic.audit.rank)


class Subject:
    """A model with adapters on the meta device, and the step that is to be planned.

    Args:
        trained: A, B and trained copies by name.
        device: `"cuda"` or `"cpu"`: where the model will be.
        task: what it is trained to do.
        check: raises a `UsageError` for a placement that the model does not allow.
        objective: makes what is minimised, where that is more than the cross entropy.
    """

    def __init__(
        self,
        skeleton: nn.Module,
        trained: Mapping[str, nn.Parameter],
        workload: Workload,
        *,
        device: str,
        task: Task = CAUSAL,
        check: Callable[[Placement], None] = lambda placement: None,
        objective: TracedObjective | None = None,
    ) -> None:
        self.skeleton, self.trained = skeleton, trained
        self.workload, self.device, self.check, self.task = workload, device, check, task
        self.objective = objective
        self.activations = trace(
            skeleton,
            workload.rows,
            workload.tokens,
            checkpointing=workload.checkpointing,
            targets=workload.targets,
            device=device,
            task=task,
            lengths=workload.lengths,
            **({} if objective is None else {"objective": objective}),
        )
        self._method = method_plan(skeleton)
        self._units: dict[tuple[Any, int], tuple[Unit, ...]] = {}

    def recomputing(self, how: Recompute) -> Subject:
        """The same where other activations are recomputed."""
        if how == self.workload.checkpointing:
            return self
        workload = replace(self.workload, checkpointing=how)
        others: dict[str, Any] = {"device": self.device, "task": self.task, "check": self.check}
        return Subject(self.skeleton, self.trained, workload, objective=self.objective, **others)

    @property
    def teacher(self) -> FoundTeacher | None:
        """Of a distillation."""
        return None if self.objective is None else self.objective.found

    def units(self, placement: Placement) -> tuple[Unit, ...]:
        """The groups of a placement's engine: those worth most when resident come first."""
        engine, ranks = engine_class(placement), placement.shard_size
        if (engine, ranks) not in self._units:
            groups = frozen_groups(engine.groups(self.skeleton))
            ranked = worth_holding(groups, self.skeleton)
            ranked += [group for group in groups if group.held]
            self._units[engine, ranks] = units_of(
                ranked, self.skeleton, self.trained, ranks, self.workload
            )
        return self._units[engine, ranks]

    def plan(
        self,
        placement: Placement,
        topology: Topology,
        *,
        divided: bool = False,
        held: Collection[str] = (),
    ) -> Plan:
        """The plan of a placement, with the units at the paths `held` resident."""
        units = self.units(placement)
        common: dict[str, Any] = {
            "placement": placement,
            "topology": topology,
            "workload": self.workload,
            "divided": divided,
        }
        sums = {"summed": self._method.summed, "summed_always": self._method.summed_always}
        beside = teacher_bytes(
            self.teacher, placement, self.workload.micro_batches, AT_ONCE[self.device]
        )
        sent: dict[str, Any] = {**sums, **common, "teacher": beside.gathers}
        traffic = traffic_of(units, held, self.trained, **sent)
        bare = traffic_of(units, (), self.trained, **sent) if held else traffic
        return Plan(
            resident=tuple(dict.fromkeys(u.path for u in units if u.path in held and not u.always)),
            trainable=sum(p.numel() for p in self.trained.values()),
            flops=self.activations.flops * self.workload.micro_batches,
            memory=memory_of(
                units,
                held,
                self.trained,
                activations=self.activations,
                offsets=offset_bytes(self.skeleton) + self._copies(),
                casts=self._casts(),
                device=self.device,
                method=self._method,
                teacher=beside,
                half=self._dtype in (torch.bfloat16, torch.float16),
                **common,
            ),
            traffic=traffic,
            spared=round(bare.gathers.rank - traffic.gathers.rank),
            **common,
        )

    @property
    def _dtype(self) -> torch.dtype | None:
        """What the model computes in: that of W0, of a packed one of what is not packed."""
        frozen = (p for p in self.skeleton.parameters() if not p.requires_grad)
        return next((p.dtype for p in frozen if p.is_floating_point()), None)

    def _copies(self) -> int:
        """Bytes of the copies that a policy is compared with."""
        sizes = (p.numel() * p.element_size() for p in self.trained.values())
        return sum(sizes) if self.workload.copied else 0

    def _casts(self) -> int:
        """Bytes of A and B in the dtype that the model computes in, if another."""
        dtype = self._dtype
        factors = [*self.trained.values(), *offsets_of(self.skeleton)]
        others = [p for p in factors if dtype is not None and p.dtype != dtype]
        return sum(p.numel() * dtype.itemsize for p in others) if dtype is not None else 0

    def plan_within(
        self, placement: Placement, topology: Topology, budget: int, *, divided: bool = False
    ) -> Plan:
        """The plan with as many resident layers as fit `budget` bytes beside all else.

        In the order of `shard(resident=…)`, every layer is taken that still fits.
        """
        plan = self.plan(placement, topology, divided=divided)
        if placement.shard_size == 1:
            return plan
        units, held = self.units(placement), set[str]()
        for unit in (unit for unit in units if not unit.always):
            with_it = plan.memory.holding(units, {*held, unit.path})
            if with_it.peak <= budget:
                held.add(unit.path)
        return self.plan(placement, topology, divided=divided, held=held) if held else plan
