"""How an adapter leaves a run that goes on with the others: finished, failed or dropped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from dlora.lora.names import by_name
from dlora.lora.shared_batch import only
from dlora.methods.trained_replica import TrainedReplica, replica_of
from dlora.metrics.events import FAILED, FINISHED, STOPPED
from dlora.metrics.log import held_out_line
from dlora.plan.measured import Measured
from dlora.plan.report import comparison
from dlora.runtime.console import console
from dlora.together.context import JointContext
from dlora.together.member import Member, Standing
from dlora.training.best import keep
from dlora.training.checkpointing import CheckpointManager
from dlora.training.evaluate import print_samples
from dlora.training.finish import save_result
from dlora.training.record import record, record_finished, report_on

# standing → the event of it, and by what name that says why
_RECORDED = {
    Standing.FINISHED: (FINISHED, ""),
    Standing.FAILED: (FAILED, "why"),
    Standing.DROPPED: (STOPPED, "cause"),
}


def finish(joint: JointContext, member: Member, checkpoints: CheckpointManager, done: int) -> int:
    """Write a trained adapter, its reports and its last lines; returns the exit status."""
    context, method, status = member.context, member.context.replica.method, 0
    with by_name(joint.model, member.name), only(joint.model, member.name):
        if context.ranks.main and member.log is not None:
            try:
                context.write_method_files(done)
                method.report(context.directory, member.log, member.say)
            except OSError as error:
                console.error(f"{member.name}: its reports could not be written: {error}")
                status = 1
        if member.log is not None:
            member.log.close()
            print_samples(context, "after training", member.name, done)
            if context.ranks.main and (line := held_out_line(context.directory)):
                member.say(line)
        member.losses.close()
        status |= save_result(context, checkpoints)
    if member.running:
        leave(joint, member, Standing.FINISHED, done)
    return status


def keep_each(
    joint: JointContext, improved: Sequence[Member], checkpoints: CheckpointManager
) -> None:
    """Put adapters in the places of their best ones, once the step is committed."""
    for member in improved:
        with by_name(joint.model, member.name), only(joint.model, member.name):
            keep(member.context, checkpoints)


def close(joint: JointContext, measured: Measured | None, status: int) -> int:
    """The last lines of a run whose adapters have all left; returns its exit status.

    Args:
        measured: what it took; None: every adapter had left before this start.
        status: of the adapters.
    """
    if measured is not None:
        console.info(comparison(joint.residents.plan, measured, joint.ranks.device.type))
    step = joint.prepared.total_steps
    if status == 0:
        record_finished(joint, step, measured)
        return 0
    failed = [m.name for m in joint.members if m.standing is Standing.FAILED]
    why = f"failed: {', '.join(failed)}" if failed else "an adapter was not written"
    record(joint, FAILED, step, why=why)
    report_on(joint)  # on the others
    if failed:
        console.error(f"{why}; the other adapters are trained")
    return status


def leave(
    joint: JointContext, member: Member, standing: Standing, done: int, why: str = ""
) -> None:
    """Take an adapter out of training; it stays on the model, frozen, for checkpoints to have it.

    Its gradients, its optimizer's state and its part of the reduction are gone.

    Args:
        done: optimizer steps.
    """
    replica, shared = member.context.replica, replica_of(joint.model)
    assert isinstance(shared, TrainedReplica)
    member.record = replica.method.record()
    for parameter in replica.named.values():
        parameter.grad = None
        parameter.data = parameter.data.clone()  # out of the buffer, which is freed
        parameter.requires_grad_(False)
    shared.leave(member.name)
    replica.disown()
    idle: Any = torch.optim.SGD([torch.zeros(())], lr=0.0)
    member.context = replace(member.context, replica=shared, optimizer=idle)
    member.standing, member.why = standing, why
    event, about = _RECORDED[standing]
    record(member.context, event, done, **{about: why} if about else {})
