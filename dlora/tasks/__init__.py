"""What a model is trained to do: its class, its sequences, its loss, what is counted beside it.

A task is one file, a class with the members of `Task` (`task.py`), found by its `name`.
"""

from dlora.registry import Parts
from dlora.tasks.causal import Causal
from dlora.tasks.task import Task

TASKS: Parts[type[Task]] = Parts("tasks")
CAUSAL = Causal()

__all__ = ["CAUSAL", "TASKS", "Task"]
