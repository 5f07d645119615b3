"""lm-eval's tasks, from files on this machine: found before weights are read, then run.

The network is not used: a task's data are files beside it (`dataset_path: json`), or in the cache
of `datasets`.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from dlora.errors import UsageError
from dlora.evaluation.opened import OpenedModel
from dlora.io.files import path_of
from dlora.runtime.ranks import Ranks

DRAWS = 1000  # of a standard error that has no formula
_NEEDED = "--tasks needs lm-eval: pip install 'dlora[eval]'"


def load_tasks(names: Sequence[str], include_path: str | None) -> list[Any]:
    """The tasks of these names, with their data.

    Args:
        names: of YAML files, or of tasks in `include_path`, or else of lm-eval's own.

    Raises:
        UsageError: lm-eval is not installed, there is no such task, or it cannot be read.
    """
    manager = _lm_eval("tasks").TaskManager
    place = None
    if include_path is not None:
        place = path_of(include_path, "--include-path")
        if not place.is_dir():
            raise UsageError(f"--include-path: {include_path} is no directory")
    found = [_file_of(name) or name for name in names]
    with _offline():
        own = manager(include_path=place and str(place), include_defaults=False)
        known = set(own.all_tasks)
        if any(isinstance(name, str) and name not in known for name in found):
            own = manager(include_path=place and str(place))
            known = set(own.all_tasks)
        tasks: dict[str, Any] = {}
        for name in found:
            if isinstance(name, str) and name not in known:
                raise UsageError(f"--tasks: {name} is neither a file nor a task of lm-eval's")
            tasks |= _loaded(own, name)
    return list(tasks.values())


def run_tasks(
    tasks: list[Any],
    opened: OpenedModel,
    model: Any,
    ranks: Ranks,
    *,
    rows: int,
    limit: int | None,
    few_shot: int | None,
    as_chat: bool,
) -> dict[str, dict[str, Any]]:
    """{task: {metric: value}}; collective, and empty but on the first rank of a machine.

    Args:
        rows: sequences in a pass of a rank.
        limit: documents of each task; None: all.
        few_shot: examples in a prompt; None: as the task says.
        as_chat: apply the chat template to prompts.
    """
    harness = importlib.import_module("dlora.evaluation.harness")
    with _one_process():
        results = _lm_eval("evaluator").simple_evaluate(
            model=harness.DloraLM(opened, model, ranks, rows),
            tasks=tasks,
            num_fewshot=few_shot,
            limit=limit,
            apply_chat_template=as_chat,
            log_samples=False,
            bootstrap_iters=DRAWS,
        )
    found = (results or {}).get("results", {})
    return {task: dict(_figures(values)) for task, values in found.items()}


def _figures(values: dict[str, Any]) -> Iterator[tuple[str, float | None]]:
    """The metrics of a task; `none` is the name of lm-eval's filter that does nothing."""
    for name, value in values.items():
        if isinstance(value, int | float) and name not in ("sample_len", "sample_count"):
            finite = float(value) if math.isfinite(value) else None
            yield name.removesuffix(",none").replace(",", " "), finite


def _file_of(name: str) -> Path | None:
    """The YAML file of this name."""
    path = path_of(name, "--tasks")
    if path.suffix not in (".yaml", ".yml"):
        return None
    if not path.is_file():
        raise UsageError(f"--tasks: file {name} does not exist")
    return path


def _loaded(manager: Any, task: Path | str) -> dict[str, Any]:
    try:
        found: dict[str, Any] = manager.load([str(task)])["tasks"]
    except Exception as error:  # whatever a task file, or the loader of its data, raises
        first = (str(error).strip() or type(error).__name__).split("\n")[0]
        raise UsageError(f"--tasks: {task} cannot be loaded: {first}") from error
    return found


def _lm_eval(module: str) -> ModuleType:
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    try:
        return importlib.import_module(f"lm_eval.{module}")
    except ImportError as error:
        raise UsageError(_NEEDED) from error


@contextlib.contextmanager
def _one_process() -> Iterator[None]:
    """Inside, lm-eval computes standard errors in this process: a rank should not be forked."""
    name = "DISABLE_MULTIPROC"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """Inside, neither `datasets` nor the hub's client uses the network."""
    names = ("datasets.config", "huggingface_hub.constants")
    modules: list[Any] = [importlib.import_module(name) for name in names]
    before = [module.HF_HUB_OFFLINE for module in modules]
    for module in modules:
        module.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        for module, value in zip(modules, before, strict=True):
            module.HF_HUB_OFFLINE = value
