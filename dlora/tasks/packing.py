"""Whether the sequences of a micro-batch share a row: `data.packing`."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from dlora.errors import UsageError
from dlora.objectives.packable import why_not
from dlora.tasks.task import Task


def settle_packing(
    setting: object,
    task: Task,
    skeleton: nn.Module,
    announce: Callable[[str], None] = lambda line: None,
) -> bool:
    """Whether they do: as `data.packing` says, or where the model allows it.

    Args:
        skeleton: the model, which may be on the meta device.
        announce: gets the reason where `auto` does not pack.

    Raises:
        UsageError: it is set, and the task or the model does not allow it.
    """
    if setting is False:
        return False
    own = task.why_no_packing or f"train.task: {task.name} has a row for each"
    reason = why_not(skeleton) if task.packs else own
    if not reason:
        return True
    if setting is True:
        raise UsageError(f"data.packing: {reason}; set data.packing: auto or false")
    if task.packs or task.why_no_packing:
        announce(f"data.packing: off: {reason}")
    return False
