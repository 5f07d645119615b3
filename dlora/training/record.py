"""What a run records in `events.jsonl` beside its figures, and the page of it at its end."""

from __future__ import annotations

from typing import Any

from dlora.config.load import Config
from dlora.metrics.events import FAILED, FINISHED, HEALED, SAMPLE, START, STOPPED, add_event
from dlora.plan.measured import Measured
from dlora.plan.report import measured_bytes, planned_bytes
from dlora.report.page import write_report
from dlora.runtime.console import console
from dlora.runtime.ranks import Ranks
from dlora.training.checkpointing import RESUMES
from dlora.training.context import SavedRun


def record(run: SavedRun, event: str, step: int, **values: Any) -> None:
    """Add a line to the events of a run; rank 0 does."""
    if run.ranks.main:
        add_event(run.directory, event, step, values, warn=console.warning)


def record_start(run: SavedRun, step: int, steps: Any) -> None:
    """Record a start of a run: where it begins, on what, and what it plans.

    Args:
        steps: of the whole run, or of each adapter by name.
    """
    topology, device = run.topology, run.ranks.device.type
    several = {"adapters": steps} if isinstance(steps, dict) else {}
    record(
        run,
        START,
        step,
        steps=max(steps.values()) if several else steps,
        **several,
        ranks=topology.world,
        nodes=topology.nodes,
        device=device,
        planned=planned_bytes(run.residents.plan, device),
    )


def record_samples(run: SavedRun, step: int, when: str, answers: Any) -> None:
    """Record answers to some prompts.

    Args:
        when: `before training` or `after training`.
        answers: (prompt, what is wanted, answer).
    """
    for prompt, wanted, answer in answers:
        record(run, SAMPLE, step, when=when, prompt=prompt, wanted=wanted, answer=answer)


def log_healed(config: Config, ranks: Ranks, replica: Any, what: str) -> None:
    """Let a replica's audit repair what it finds, print that and record it.

    Args:
        what: the adapters are called.
    """

    def healed(found: str) -> None:
        console.info(f"warning: {what} differed between ranks: {found}; healed (sharding.audit)")
        if ranks.main:
            values = {"found": found}
            add_event(config.output.directory, HEALED, replica.reductions, values, console.warning)

    replica.healed = healed


def record_finished(run: SavedRun, step: int, measured: Measured | None) -> None:
    """Record that a run is over, and write its page."""
    values = {"measured": measured_bytes(measured)} if measured is not None else {}
    record(run, FINISHED, step, **values)
    report_on(run)


def report_on(run: SavedRun) -> None:
    """Write `report.html` where `output.report` asks for it; what goes wrong is a line.

    Whatever it is: the adapter is written, and a page must not change how a run ends.
    """
    if not (run.ranks.main and run.config.output.report):
        return
    try:
        run.lock.check()
        console.info(f"report: {write_report(run.directory)}")
    except Exception as error:
        console.warning(f"output.report: the report could not be written: {error!r}")


def stopped(run: SavedRun, step: int, cause: str | None, status: int) -> int:
    """The end of a run that was asked to stop; returns its exit status."""
    cause = cause or "another rank"
    record(run, STOPPED, step, cause=cause)
    console.info(f"stopped by {cause} after step {step}; {RESUMES}")
    return status


def failed(run: SavedRun, step: int, why: str) -> int:
    """The end of a run that cannot go on; returns its exit status."""
    record(run, FAILED, step, why=why)
    console.error(f"stopped after step {step}: {why}")
    return 1
