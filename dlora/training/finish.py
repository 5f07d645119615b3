"""The end of a run: closing lines, the comparison with the plan, and the adapter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dlora.adapters.checkpoint_layout import part_line
from dlora.adapters.recorded import write_labels
from dlora.adapters.save_load import save_adapter
from dlora.adapters.write import converted_line
from dlora.base.answering import write_beside_adapter
from dlora.data.stream import Stream
from dlora.metrics.log import held_out_line
from dlora.plan.measured import measure, stored
from dlora.plan.report import comparison
from dlora.runtime.console import console
from dlora.training.card import write_card
from dlora.training.checkpointing import RESUMES, CheckpointManager
from dlora.training.context import RunContext
from dlora.training.evaluate import print_samples
from dlora.training.record import record_finished, report_on


def finish(
    context: RunContext, checkpoints: CheckpointManager, records: Sequence[Mapping[str, Any]]
) -> int:
    """Print the closing lines and save the adapter; returns the exit status.

    Args:
        records: lines of the metrics, one for each step since the start.
    """
    if isinstance(context.prepared.train, Stream):  # of a data set in memory, the start said it
        console.info(f"data.train: read in the last pass: {context.prepared.train.report}")
    last = records[-1]["step"] if records else context.prepared.sampler.total_steps
    step = context.ended_at or last
    print_samples(context, "after training", step=step)
    if context.ranks.main and (line := held_out_line(context.directory, context.ended_at)):
        console.info(line)
    status, measured = save_result(context, checkpoints), None
    if records:
        now = stored(context.model, context.replica, context.optimizer)
        measured = measure(context.replica, records, now)
        console.info(comparison(context.residents.plan, measured, context.ranks.device.type))
    if status == 0:
        record_finished(context, step, measured)
    return status


def save_again(context: RunContext, checkpoints: CheckpointManager) -> int:
    """Write the adapter of a run that is finished already, which may have ended between its last
    two files, and its page; returns the exit status."""
    status = save_result(context, checkpoints)
    if status == 0:
        report_on(context)
    return status


def save_result(context: RunContext, checkpoints: CheckpointManager) -> int:
    """Write the adapter that stock PEFT loads; returns the exit status (rank 0's counts)."""
    where = context.directory / "adapter"
    try:
        if context.ranks.main:
            context.lock.check()
            base = context.prepared.base
            write_adapter(context, where)
            kept = write_card(context, where)
            checkpoints.publish(where)
            lines = converted_line(base.path, base.source), part_line(context.model, base.config())
            for line in filter(None, (*lines, kept)):
                console.info(line)
    except OSError as error:
        console.error(f"{where} could not be written: {error}; free the disk and {RESUMES}")
        return 1
    console.info(f"adapter: {where}")
    return 0


def write_adapter(context: RunContext, where: Path) -> None:
    """Write the adapter as it is now, with all that it needs to answer as it was trained."""
    base = context.prepared.base.source
    save_adapter(context.model, where, base_model_name_or_path=base, name=context.name)
    _write_answering(context, where)


def _write_answering(context: RunContext, where: Path) -> None:
    """Write beside the adapter what its base lacks to answer as it was trained.

    Of a classification these are the names of its labels, in order.
    """
    prepared, data = context.prepared, context.config.data
    if labels := prepared.task.labels:
        write_labels(where, labels)
        return
    has_own = data.chat_template is not None or data.chat_template_kwargs
    tokenizer = prepared.tokenizer if has_own else None
    write_beside_adapter(where, prepared.base, tokenizer, prepared.train.report.ends)
