"""Trackers of experiments, through accelerate's adapters: `output.report_to`.

A run writes to them from rank 0 alone. Each has one run of its own for one run of dlora, across
stops: its id lies in `trackers.json` in `output.dir`, and a run that resumes there goes on with it.
Steps that a tracker has had before a stop are not sent again.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dlora.errors import UsageError
from dlora.io.files import write_atomically

FILE = "trackers.json"
PROJECT = "dlora"  # where the tracker's own variable names no other


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker is told of a run.

    Attributes:
        name: shown beside others.
        directory: `output.dir`.
        id: of the tracker's run that this one goes on with; None: a new one.
    """

    name: str
    directory: Path
    id: str | None = None

    @property
    def given_id(self) -> str:
        """The id, or a new one, for trackers that let a program choose it."""
        return self.id or uuid.uuid4().hex


class Trackers:
    """The trackers of a run; a failure of one of them warns once, and ends nothing.

    Args:
        names: keys of `STARTERS`.
        configuration: of the run, {dotted key: value}, which the trackers show.
        resumes: whether the run goes on with what lies in `directory`.
        warn: gets a line if a tracker fails later.

    Raises:
        UsageError: a tracker cannot start; the message is the tracker's own.
    """

    def __init__(
        self,
        names: Sequence[str],
        directory: Path,
        configuration: Mapping[str, Any],
        *,
        resumes: bool,
        warn: Callable[[str], None] = print,
    ) -> None:
        self._warn, self._failed = warn, set[str]()
        self._path, self._last = directory / FILE, -1
        earlier = _ids(self._path) if resumes else {}
        self._trackers: dict[str, Any] = {}
        self._ids: dict[str, str] = {}
        for name in names:
            run = TrackedRun(directory.absolute().name, directory, earlier.get(name))
            try:
                with _plain_logger():
                    self._trackers[name], self._ids[name] = STARTERS[name](run)
                    if not (run.id and name in _FIXED):
                        self._trackers[name].store_init_configuration(_flat(configuration))
            except Exception as error:  # each has its own
                self.close()
                said = str(error).strip().partition("\n")[0] or type(error).__name__
                raise UsageError(f"output.report_to: {name} cannot start: {said}") from error

    def begin(self, last: int) -> None:
        """Record the ids, and the last step that was reported before: `last` and earlier ones."""
        write_atomically(self._path, (json.dumps(self._ids) + "\n").encode())
        self._last = last

    def write(self, record: Mapping[str, Any]) -> None:
        """Report the numbers of a line of the metrics."""
        if record["step"] <= self._last:
            return
        values = {k: v for k, v in record.items() if isinstance(v, (int, float)) and k != "step"}
        for name, tracker in self._trackers.items():
            with self._warning(name):
                tracker.log(values, step=record["step"])

    def close(self) -> None:
        """End the trackers' runs, so that all of it is sent or stored."""
        for name, tracker in self._trackers.items():
            with self._warning(name):
                tracker.finish()
        self._trackers = {}

    @contextlib.contextmanager
    def _warning(self, name: str) -> Iterator[None]:
        try:
            with _plain_logger():
                yield
        except Exception as error:
            if name not in self._failed:
                self._warn(f"output.report_to: {name} failed: {error}; the run continues")
            self._failed.add(name)


def import_trackers(names: Sequence[str]) -> None:
    """Import what the trackers need; without names, nothing."""
    if names:
        import accelerate.tracking  # noqa: F401
    for name in names:
        __import__(name)


def _wandb(run: TrackedRun) -> tuple[Any, str]:
    from accelerate.tracking import WandBTracker

    project, chosen = os.environ.get("WANDB_PROJECT", PROJECT), os.environ.get("WANDB_RUN_ID")
    name = chosen or run.given_id
    place = os.environ.get("WANDB_DIR", str(run.directory))
    started = _started(
        WandBTracker(project, id=name, name=run.name, dir=place, resume="allow"),
    )
    return started, name


def _trackio(run: TrackedRun) -> tuple[Any, str]:
    from accelerate.tracking import TrackioTracker

    name = run.id or f"{run.name}-{run.given_id[:8]}"  # trackio knows runs by their names
    project = os.environ.get("TRACKIO_PROJECT", PROJECT)
    return _started(TrackioTracker(project, name=name, resume="allow")), name


def _comet_ml(run: TrackedRun) -> tuple[Any, str]:
    from accelerate.tracking import CometMLTracker

    name = os.environ.get("COMET_EXPERIMENT_KEY") or run.given_id
    project = os.environ.get("COMET_PROJECT_NAME", PROJECT)
    tracker = _started(CometMLTracker(project, experiment_key=name, mode="get_or_create"))
    tracker.tracker.set_name(run.name)
    return tracker, name


def _mlflow(run: TrackedRun) -> tuple[Any, str]:
    from accelerate.tracking import MLflowTracker

    # MLFLOW_EXPERIMENT_NAME and MLFLOW_RUN_ID win in accelerate.
    tracker = _started(MLflowTracker(PROJECT, run_id=run.id, run_name=run.name))
    return tracker, tracker.tracker.info.run_id


def _aim(run: TrackedRun) -> tuple[Any, str]:
    from accelerate.tracking import AimTracker

    tracker = _started(AimTracker(run.name, run_hash=run.id, experiment=PROJECT))
    return tracker, tracker.tracker.hash


# name → starts the tracker's run; returns accelerate's tracker and the id of its run
STARTERS: dict[str, Callable[[TrackedRun], tuple[Any, str]]] = {
    "wandb": _wandb,
    "mlflow": _mlflow,
    "trackio": _trackio,
    "comet_ml": _comet_ml,
    "aim": _aim,
}
_FIXED = {"mlflow"}  # whose configuration cannot change once it is there


def _started(tracker: Any) -> Any:
    """Start a tracker without accelerate's own idea of ranks: this is the one that reports.

    Left to itself accelerate would start a process group to find that out.
    """
    tracker.main_process_only = False
    tracker.start()
    return tracker


class _Logger(logging.LoggerAdapter):
    """A logger with the calls that accelerate makes."""

    def warning_once(self, message: str, *args: Any) -> None:
        """Warn; accelerate's own logger would ask for its process group first."""
        self.warning(message, *args)


@contextlib.contextmanager
def _plain_logger() -> Iterator[None]:
    """Inside, accelerate's trackers log without asking which rank this is; see `_started`."""
    from accelerate import tracking

    earlier = tracking.logger
    tracking.logger = _Logger(logging.getLogger("accelerate.tracking"), {})
    try:
        yield
    finally:
        tracking.logger = earlier


def _flat(configuration: Mapping[str, Any]) -> dict[str, Any]:
    """Values that every tracker takes: what is no scalar becomes JSON."""
    scalar = (str, int, float)
    return {k: v if isinstance(v, scalar) else json.dumps(v) for k, v in configuration.items()}


def _ids(path: Path) -> dict[str, str]:
    """The ids in a `trackers.json`; none if it is damaged, and then new runs begin."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    texts = found.items() if isinstance(found, dict) else ()
    return {name: value for name, value in texts if isinstance(value, str)}
