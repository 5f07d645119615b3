"""What a run minimises, and the task that it is planned for and trained on."""

from __future__ import annotations

from collections.abc import Sequence

from dlora.config.load import Config
from dlora.config.sections import task_name
from dlora.objectives.objective import Objective
from dlora.registry import room
from dlora.tasks import TASKS, Task
from dlora.tasks.preference import Preference


def objective_of(config: Config) -> Objective:
    """What `train.objective` minimises."""
    name = config.train.objective
    made: Objective = room("objectives")[name].load()(getattr(config, name, None))
    return made


def made_task(config: Config, labels: Sequence[str] = ()) -> Task:
    """The task of a run: `train.task` with its labels, or what the objective makes of it."""
    task = TASKS[task_name(config)](labels)
    if isinstance(task, Preference):
        task.objective = objective_of(config)  # type: ignore[assignment]
    return task
