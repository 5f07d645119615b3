"""The teacher of a distillation in a run: checked before a weight is read, and loaded."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from dlora.adapters.swap import load_named
from dlora.base.model import BaseModel
from dlora.config.load import Config
from dlora.errors import UsageError
from dlora.lora.attach import named_adapters
from dlora.lora.names import by_name
from dlora.methods.trained_replica import TrainedReplica, replicate
from dlora.objectives.packable import why_not
from dlora.objectives.teachers import OtherBase, OwnBase, Teacher, TopK, Written, with_adapter
from dlora.plan.teacher import FoundTeacher
from dlora.runtime.console import console
from dlora.sharding.engines.protocol import Engine, build_engine
from dlora.tasks import Task
from dlora.training.checks import check_adapter
from dlora.training.find_checkpoint import ResumePoint

NAME = "teacher"  # of its adapter among those of a model


def prepare_teacher(
    found: FoundTeacher,
    config: Config,
    tokenizer: Any,
    resumed: ResumePoint | None,
    announce: Callable[[str], None],
    *,
    packs: bool,
) -> bool:
    """Check a teacher beside the run's data and checkpoint; whether sequences may share rows.

    Args:
        packs: whether those of the model may.

    Raises:
        UsageError: its vocabulary or its adapter does not fit, it cannot pack and
            `data.packing: true` asks for it, or the run began with another one.
    """
    found.check(tokenizer)
    if found.adapted is not None and found.adapter is not None:
        check_adapter(found.adapted, found.adapter)
    before = None if resumed is None else resumed.state.get("teacher")
    if before is not None and before != found.identity:
        said = "the weights of the teacher are others"
        if not config.output.resume_force:
            raise UsageError(
                f"distill.teacher: {said} than those that {resumed and resumed.directory} was "
                "trained with (output.resume: none starts afresh, output.resume_force: true "
                "resumes anyway)"
            )
        announce(f"output.resume_force: resumes although {said}")
    reason = why_not(found.skeleton) if packs and found.skeleton is not None else ""
    if reason and config.data.packing is True:
        raise UsageError(f"data.packing: the teacher: {reason}; set data.packing: auto or false")
    if reason:
        announce(f"data.packing: off: the teacher: {reason}")
    return packs and not reason


def build_teacher(
    prepared: Any, model: nn.Module, replica: TrainedReplica, device: torch.device
) -> Teacher:
    """Load the teacher of a run, or its adapter. Collective.

    Args:
        prepared: the `Preparation`.
        model: that learns, and `replica` of its adapters.
    """
    found: FoundTeacher = prepared.teacher
    if (taught := found.taught) is not None:

        def read(batch: Any) -> TopK:
            return TopK(*(part.to(device) for part in taught.read(batch.ids)))

        return Written(read)
    if found.base is None:
        if found.adapter is None:
            return OwnBase()
        _load_adapter(model, found)
        return OwnBase(partial(with_adapter, name=NAME))
    engine = build_engine(prepared.placement, prepared.topology)
    engine.wire = replica.engine.wire  # one figure for both
    teacher, beside = load_teacher(found, prepared.task, engine, device)
    replica.released_with.append(beside.release)
    console.info(f"distill.teacher: {found.base.path}, {type(teacher).__name__}")
    return OtherBase(teacher)


def load_teacher(
    found: FoundTeacher,
    task: Task,
    engine: Engine,
    device: torch.device,
    base: BaseModel | None = None,
) -> tuple[nn.Module, TrainedReplica]:
    """Load the model of a teacher, in eval mode, and what frees its gathered weights. Collective.

    Args:
        base: where it is not the teacher's own.
    """
    base = found.base or base
    assert base is not None
    teacher = base.load(engine, device)
    beside = replicate(teacher, engine)
    if found.adapter is not None:
        _load_adapter(teacher, found)
    task.install(teacher.eval())
    return teacher, beside


def _load_adapter(model: nn.Module, found: FoundTeacher) -> None:
    assert found.adapter is not None
    load_named(model, found.adapter, NAME, is_trainable=False)
    with by_name(model, NAME):
        for _, _, adapter in named_adapters(model):
            adapter.dropout = 0.0  # a teacher draws nothing
