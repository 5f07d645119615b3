"""What a run minimises, and the task that it is planned for and trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dlora.config.load import Config, value_of
from dlora.config.sections import task_name
from dlora.objectives.objective import objective_of
from dlora.registry import room
from dlora.tasks import TASKS, Task
from dlora.tasks.preference import Preference


def copies_adapter(config: Config, earlier: Mapping[str, Any] | None = None) -> bool:
    """Whether a policy is compared with a copy of the adapter that its run began with.

    Args:
        earlier: the settings of the run that is resumed: since then `adapter.path` may have been
            changed, or be gone.
    """
    objective = config.train.objective
    if not room("objectives")[objective].says.get("compares"):
        return False
    setting = value_of(config, f"{objective}.reference")
    if setting != "auto":
        return bool(setting == "adapter")
    if earlier is not None:
        return (earlier.get("adapter") or {}).get("path") is not None
    return config.adapter.path is not None


def made_task(config: Config, labels: Sequence[str] = ()) -> Task:
    """The task of a run: `train.task` with its labels, or what the objective makes of it."""
    task = TASKS[task_name(config)](labels)
    if isinstance(task, Preference):
        task.objective = objective_of(config)  # type: ignore[assignment]
    return task
