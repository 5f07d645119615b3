"""`output.dir/best`: the adapter of the best evaluation, as PEFT loads it.

    best/adapter_model.safetensors, adapter_config.json, …     as in adapter/
    best/best.json                                             {"step", "metric", "mode", "value"}

An evaluation that is the best so far is a save as well. Its checkpoint is committed first, so what
is in `best/` is never newer than the checkpoint from which a run resumes.
"""

from __future__ import annotations

import contextlib
import json
import os

from dlora.errors import UsageError
from dlora.io.files import (
    finish_replacing,
    read_object,
    replaced_directory,
    unused_name,
    write_atomically,
)
from dlora.runtime.agreement import broadcast
from dlora.runtime.console import console
from dlora.training.checkpointing import CheckpointManager
from dlora.training.context import BEST, RunContext
from dlora.training.evaluate import evaluate
from dlora.training.finish import write_adapter
from dlora.training.reporting import due
from dlora.training.selection import STOPPED_BY

ABOUT = "best.json"


def see(context: RunContext, step: int) -> dict[str, float | str]:
    """Evaluate, and follow the figures; collective, the same on every rank.

    Returns:
        What the step's line of the metrics gets.
    """
    figures: dict[str, float | str] = dict(evaluate(context))
    selection = context.selection
    if selection.acts:
        selection.see(step, {n: v for n, v in figures.items() if not isinstance(v, str)})
        if selection.over:
            figures["stopped_by"] = STOPPED_BY
    return figures


def keep(context: RunContext, checkpoints: CheckpointManager) -> None:
    """Put the adapter as it is now in the place of the best; rank 0 writes.

    A failed write is a warning: the next better evaluation tries again.
    """
    if not context.ranks.main:
        return
    checkpoints.settle()  # the checkpoint of this step first
    _write(context)


def take_up(context: RunContext, start: int) -> None:
    """Follow the evaluations of a resumed run from where its checkpoint has them; collective.

    Args:
        start: the step of the checkpoint.
    """
    selection, resumed = context.selection, context.prepared.resumed
    if not selection.acts or resumed is None:
        return
    selection.load(resumed.state)
    last = start == context.prepared.sampler.total_steps
    if selection.seen < start and due(start, context.eval_every, last=last):
        see(context, start)  # the checkpoint was written before it


def reconcile(context: RunContext, start: int) -> None:
    """Let `best/` be what the checkpoint says, once the directory is this run's; collective.

    Where the adapter of the best evaluation is not there, the best from here on is kept.
    """
    followed = context.selection.best
    if followed is None or start == 0:
        return
    is_there = not context.ranks.main or _is_there(context, start)
    if not broadcast(context.ranks, f"best/{context.name}", is_there):
        followed.best = followed.step = None


def _is_there(context: RunContext, start: int) -> bool:
    """Whether `best/` has the adapter of the best evaluation; it is written if it is that of now.

    What is there of another evaluation is renamed.
    """
    followed, where = context.selection.best, context.directory / BEST
    assert followed is not None
    context.lock.check()
    finish_replacing(where)
    found = None
    if (where / ABOUT).exists():
        with contextlib.suppress(UsageError):
            found = read_object(where / ABOUT).get("step")
    if found == followed.step is not None:
        return True
    if where.exists():
        os.rename(where, unused_name(where))
    if followed.step == start:
        return _write(context)
    if followed.step is not None:
        console.info(
            f"output.keep_best: the adapter of step {followed.step} ({followed.metric} "
            f"{followed.best:.4f}) is not in {where}; the best from here on is kept"
        )
    return followed.step is None


def _write(context: RunContext) -> bool:
    """Write the adapter as it is now; whether that succeeded."""
    followed, where = context.selection.best, context.directory / BEST
    assert followed is not None
    about = {"step": followed.step, "metric": followed.metric, "mode": followed.mode}
    try:
        context.lock.check()
        with replaced_directory(where) as folder:
            write_adapter(context, folder)
            write_atomically(folder / ABOUT, json.dumps(about | {"value": followed.best}).encode())
    except OSError as error:
        console.warning(f"{where} could not be written: {error}; the run continues")
        return False
    console.info(
        f"best so far: step {followed.step}, {followed.metric} {followed.best:.4f}: {where}"
    )
    return True
