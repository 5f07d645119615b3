"""Everything that a run needs and that can be wrong, before a weight is read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from dlora.base.model import BaseModel
from dlora.base.skeleton import check_divides
from dlora.config.load import Config
from dlora.data import Dataset, Dealing, Example, Sampler
from dlora.data.collate import Batch
from dlora.data.stream import Stream, StreamSampler
from dlora.errors import UsageError
from dlora.lora.attach import (
    attachment_of,
    trainable_parameters,
)
from dlora.lora.config import LoraConfig
from dlora.lora.left import unreached_by_text
from dlora.plan.choose import Decision, capacity_of, decide
from dlora.plan.micro_batches import settle_micro_batches
from dlora.plan.objective import copies_adapter
from dlora.plan.plan import Plan, Subject
from dlora.plan.teacher import FoundTeacher
from dlora.plan.teacher_bytes import TracedObjective
from dlora.plan.workload import Workload, workload_of
from dlora.sharding.topology import Placement, Topology
from dlora.tasks import Task
from dlora.training.earlier_placement import earlier_placement, settle
from dlora.training.find_checkpoint import ResumePoint
from dlora.training.material import Material, Surroundings, gather_material
from dlora.training.prepare_data import (
    Once,
    by_itself,
)
from dlora.training.reference import check_reference, reference_line
from dlora.training.settle_compile import (
    changed_compile,
    earlier_compile,
    settle_compile,
)


class Planned:
    """A run that is planned: where it lies is decided."""

    decision: Decision

    @property
    def budget(self) -> Plan:
        """The plan that was chosen."""
        return self.decision.plan

    @property
    def placement(self) -> Placement:
        """Where W0 lives."""
        return self.budget.placement

    @property
    def divided(self) -> bool:
        """Whether the optimizer state is divided over ranks."""
        return self.budget.divided


@dataclass(frozen=True)
class Preparation(Planned):
    """What `prepare` found out; it has no weights.

    Attributes:
        config: with what the machines and the checkpoint decide of it (`model.dtype: auto`).
        drawn: parameters of a head that the base lacks.
        dealing: makes the micro-batches of ranks.
        compiles: whether blocks run as graphs of torch's compiler.
        retained: `forget.data`, where it is a data set.
        teacher: of a distillation.
        unreached: adapted modules that text alone does not reach, of a model that takes images too.
    """

    config: Config
    base: BaseModel
    tokenizer: Any
    train: Dataset | Stream
    eval: Dataset | None
    sampler: Sampler | StreamSampler
    lora: LoraConfig
    topology: Topology
    pad_id: int
    resumed: ResumePoint | None
    decision: Decision
    base_identity: str | None
    task: Task
    dealing: Dealing
    drawn: tuple[str, ...] = ()
    unreached: tuple[str, ...] = ()
    compiles: bool = False
    retained: Dataset | None = None
    teacher: FoundTeacher | None = None

    def collate(self, examples: Sequence[Example]) -> Batch:
        """One micro-batch, on the CPU."""
        collate = self.task.packed if self.dealing.packs else self.task.collate
        return collate(examples, self.pad_id)

    @property
    def fingerprint(self) -> str:
        """A text that is equal on ranks with the same data, settings and plan."""
        data = [self.train.fingerprint]
        data += [other.fingerprint if other else "" for other in (self.eval, self.retained)]
        data.append(self.base_identity or "")
        data.append(self.teacher.identity if self.teacher else "")
        chosen = [self.placement, self.divided, self.budget.resident, self.compiles]
        return " ".join([*data, str(self.lora), *map(str, chosen)])


def prepare(
    config: Config,
    topology: Topology,
    announce: Callable[[str], None],
    resumed: ResumePoint | None = None,
    around: Surroundings = Surroundings(),  # noqa: B008 - frozen
    once: Once = by_itself,
) -> Preparation:
    """Read the data, the tokenizer and the model's skeleton, and plan.

    Args:
        resumed: the checkpoint that the run resumes, if there is one.
        once: loads data sets; other ranks may take part.

    Raises:
        UsageError: data, model or adapter settings are wrong, named by key, file or line, or no
            placement fits the budget.
    """
    found = gather_material(config, topology, announce, resumed, around, once)
    skeleton, world, train = found.model.skeleton, topology.world, found.train

    def place(dealing: Dealing) -> Decision:
        if isinstance(train, Dataset) and isinstance(found.sampler, Sampler):
            how: dict[str, Any] = {"dealing": dealing, "task": found.task}
            workload = workload_of(config, world, train, found.sampler, **how)
        else:  # any sequence may be the longest
            workload = workload_of(config, world, dealing=dealing, task=found.task)
        copied = copies_adapter(config, resumed.settings if resumed else None)
        workload = replace(workload, reference=found.task.reference(skeleton), copied=copied)
        trained = trainable_parameters(skeleton)
        about = (config, found.task, skeleton, trained, workload, topology, around, resumed)
        return decision_of(*about, found.teacher)

    if line := reference_line(config, found.task, skeleton, resumed):
        announce(line)
    earlier = resumed.tokens_per_micro_batch(world) if resumed else None
    dealing, decision = settle_micro_batches(
        config, train, world, found.packs, place, earlier=earlier
    )
    check_reference(decision.plan.workload, decision.plan.placement)
    if config.train.tokens_per_micro_batch == "auto":
        announce(f"train.tokens_per_micro_batch: {dealing.tokens}")
    if decision.plan.divided:
        announce(
            f"optimizer state: divided, 1/{topology.world} on each rank, so a save needs all "
            "ranks: each sends its part to rank 0 (sharding.optimizer_state); there are no "
            "snapshots (output.snapshot_every), and a lost rank leaves the last save"
        )
    before = resumed.settings if resumed else None
    steps = found.sampler.total_steps
    compiles = settle_compile(
        config, decision, steps, around.compiler, earlier_compile(before), announce
    )
    if line := changed_compile(before, compiles):
        announce(line)
    return prepared_from(found, topology, dealing, decision, compiles)


def prepared_from(
    found: Material, topology: Topology, dealing: Dealing, decision: Decision, compiles: bool
) -> Preparation:
    """The preparation of one adapter's run, once it is decided where it lies."""
    skeleton = found.model.skeleton
    attachment = attachment_of(skeleton)
    return Preparation(
        found.config,
        found.base,
        found.tokenizer,
        found.train,
        found.eval,
        found.sampler,
        found.lora,
        topology,
        found.pad_id,
        found.resumed,
        decision,
        found.known,
        found.task,
        dealing,
        found.model.drawn,
        unreached=tuple(unreached_by_text(skeleton, [*attachment.adapted, *attachment.saved])),
        compiles=compiles,
        retained=found.retained,
        teacher=found.teacher,
    )


def decision_of(
    config: Config,
    task: Task,
    skeleton: Any,
    trained: Mapping[str, nn.Parameter],
    workload: Workload,
    topology: Topology,
    around: Surroundings,
    resumed: ResumePoint | None,
    teacher: FoundTeacher | None = None,
) -> Decision:
    """The plan of a run: what the settings leave open is chosen, `base: auto` above all."""
    section, world = config.sharding, topology.world
    setting = section.activation_checkpointing
    if isinstance(setting, Mapping) and "offload" in setting and around.device == "cpu":
        raise UsageError(
            "sharding.activation_checkpointing: offload needs a GPU; on a CPU activations are in "
            "host memory already"
        )
    earlier = earlier_placement(resumed.settings, resumed.state) if resumed else None
    settings = settle(config, earlier, world)
    decision = decide(
        Subject(
            skeleton,
            trained,
            workload,
            task=task,
            device=around.device,
            check=lambda placement: _check_divides(skeleton, teacher, placement),
            objective=None if teacher is None else TracedObjective(config, teacher),
        ),
        topology,
        engine=settings.engine,
        base=settings.base,
        optimizer_state=settings.optimizer_state,
        capacity=capacity_of(section.memory_budget_gb, around.free),
        offload=section.cpu_offload,
        checkpointing=setting,
        fills=section.base == "auto",
    )
    if not settings.reason:
        return decision
    is_open = settings.base == "auto"
    return replace(decision, reason=settings.reason + (f": {decision.reason}" if is_open else ""))


def _check_divides(skeleton: Any, teacher: FoundTeacher | None, placement: Placement) -> None:
    check_divides(skeleton, placement)
    if teacher is not None:
        teacher.check_divides(placement)
