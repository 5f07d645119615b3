"""The start of a run of several adapters: their logs, and what each says before its first step."""

from __future__ import annotations

from dlora.lora.names import by_name
from dlora.lora.shared_batch import only
from dlora.together.context import JointContext
from dlora.together.member import Member, Standing
from dlora.training.best import reconcile, take_up
from dlora.training.evaluate import before_training
from dlora.training.record import record_start
from dlora.training.reporting import open_log
from dlora.training.resume import open_joint_directory


def open_logs(joint: JointContext, start: int) -> list[Member]:
    """Open the logs of those that have steps left; returns those that have none.

    Before a fresh run samples are printed and held-out losses logged.

    Args:
        start: steps that are done.
    """
    open_joint_directory(joint, start)
    steps = {member.name: member.total_steps for member in joint.members}
    record_start(joint, start, steps)
    over: list[Member] = []
    for member in joint.members:
        if member.standing in (Standing.FAILED, Standing.DROPPED):
            member.say(f"has left already: {member.why}")
            joint.hooks.left(member.name, member.standing.value, member.why)
        elif not member.running or start >= member.total_steps:
            member.say(f"is already finished: {member.total_steps} steps")
            with by_name(joint.model, member.name), only(joint.model, member.name):
                take_up(member.context, member.total_steps)
                if member.context.continues:  # it may have ended before it wrote the best
                    reconcile(member.context, member.total_steps)
            over.append(member)  # an earlier start may have ended before it wrote the adapter
        else:
            _open(joint, member, start)
    return over


def _open(joint: JointContext, member: Member, start: int) -> None:
    context, name = member.context, member.name
    member.log = open_log(context, start, ())
    with by_name(joint.model, name), only(joint.model, name):
        take_up(context, start)
        reconcile(context, start)
    if start == 0:
        with by_name(joint.model, name), only(joint.model, name):
            before_training(context, member.log, member.say, name)
    context.replica.zero_grad()
    context.replica.reductions = start  # audits fall on the same steps as without a stop
