"""What a base is made as for a task."""

from __future__ import annotations

from functools import partial

from dlora.base.model_class import CAUSAL, ModelClass
from dlora.tasks import causal
from dlora.tasks.task import Task


def model_class_for(task: Task, pad_id: int | None = None) -> ModelClass:
    """The class of the model, and what the task sets on its configuration.

    Args:
        pad_id: the padding, where the configuration has none.
    """
    if isinstance(task, causal.Causal):
        return CAUSAL
    configure = partial(task.configure, pad_id=pad_id)
    return ModelClass(task.auto_class, configure, task.draws_head)
