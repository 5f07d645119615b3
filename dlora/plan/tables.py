"""What `dlora.plan` prints: all placements side by side, and the one to take in parts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from dlora.plan.choose import Candidate, Capacity, Decision
from dlora.plan.plan import Plan
from dlora.plan.report import activations_of, columns, resident_of
from dlora.plan.speed import Speeds, step_time

GB = 1e9


@dataclass(frozen=True)
class Survey:
    """All placements of a run, and the one to take.

    Attributes:
        model: its class and size in words.
        capacity: of a rank, if it is known.
        decision: over the engine of the configuration.
        others: placements by other engines.
        twins: the chosen plan, and the candidates' in order, with the other setting of activation
            checkpointing.
        graphs: whether blocks are compiled, in words.
    """

    model: str
    capacity: Capacity | None
    speeds: Speeds
    decision: Decision
    others: list[Candidate]
    twins: list[Plan | None]
    graphs: str

    @property
    def candidates(self) -> list[Candidate]:
        """All rows of the table."""
        return [*self.decision.candidates, *self.others]


def as_text(survey: Survey) -> list[str]:
    """The plan as lines."""
    chosen = survey.decision.plan
    w, t = chosen.workload, chosen.topology
    room = survey.capacity
    lines = [
        f"model      {survey.model}",
        f"machines   {t.nodes} node(s) of {t.ranks_per_node} rank(s)"
        + (f", {gb(room.nbytes)} for each rank ({room.source})" if room else ""),
        f"step       {w.micro_batches} micro-batch(es) of {w.rows} x {w.tokens} tokens a rank",
        "",
        *columns(list(_rows(survey))),
        "",
        f"takes      base: {chosen.placement.base}, engine: {chosen.placement.engine}: "
        f"{survey.decision.reason}",
    ]
    if survey.decision.warning:
        lines.append(f"warning    {survey.decision.warning}")
    parts = [*_parts(chosen), f"graphs: {survey.graphs}"]
    return [*lines, "", *parts, "", *_times(chosen, survey.speeds)]


def _rows(survey: Survey) -> Iterator[tuple[str, ...]]:
    checkpointed = survey.decision.plan.workload.checkpointing
    yield (
        *("base", "engine", "state", "W0 held"),
        *("peak", "peak, not recomputed" if checkpointed else "peak, recomputed"),
        *("inside nodes", "between nodes", "step, s", ""),
    )
    for candidate, twin in zip(survey.candidates, survey.twins, strict=True):
        plan = candidate.plan
        engine = "-" if candidate.base == "none" else candidate.engine
        if plan is None or twin is None:
            yield candidate.base, engine, "-", "-", "-", "-", "-", "-", "-", candidate.reason
            continue
        time = step_time(plan, survey.speeds)
        yield (
            candidate.base,
            engine,
            "divided" if plan.divided else "replicated",
            gb(plan.base_held),
            gb(plan.memory.peak),
            gb(twin.memory.peak),
            gb(plan.traffic.inside),
            gb(plan.traffic.between),
            f"{time.overlapped:.2f} - {time.serial:.2f}" if survey.speeds.known else "-",
            "fits" if candidate.fits else "does not fit",
        )


def _parts(plan: Plan) -> list[str]:
    m, t = plan.memory, plan.traffic
    rows = [
        ("memory of a rank", ""),
        ("  W0, its share", gb(m.base_held)),
        ("  W0, resident", gb(m.resident)),
        ("  W0, most gathered at one time", gb(m.base_gathered)),
        *([("  teacher, with what stays in a step", gb(m.teacher))] if m.teacher else []),
        ("  A and B, values and gradients", gb(m.adapters)),
        *([("  A0 and B0, frozen", gb(m.offsets))] if m.offsets else []),
        ("  optimizer state", gb(m.state)),
        ("  snapshots of A, B and state", gb(m.snapshots)),
        ("  activations kept for backward", gb(m.activations.saved)),
        ("  activations, busiest moment of the blocks", gb(m.activations.blocks)),
        ("  activations, logits and loss", gb(m.activations.loss)),
        ("  allowance for process and allocator", gb(m.allowance)),
        ("  peak", gb(m.peak)),
        *([("host memory of a node", gb(m.host))] if m.host else []),
        ("sent per optimizer step", ""),
        ("  a rank, inside its node: W0", gb(t.gathers.inside)),
        ("  a rank, inside its node: gradients", gb(t.reduction.inside)),
        ("  a node's link, each way: W0", gb(t.gathers.between)),
        ("  a node's link, each way: gradients", gb(t.reduction.between)),
        ("  a rank, every 10th step: audit", f"{plan.audit:,} B"),
    ]
    if t.mask.rank:
        rows.append(("  a rank, at a mask: scores of all triplets", gb(t.mask.rank)))
    lines = columns(rows) + [f"activations: {activations_of(plan)}"]
    return [*lines, f"resident: {resident_of(plan)}"] if plan.resident else lines


def _times(plan: Plan, speeds: Speeds) -> list[str]:
    operations = f"{plan.flops / 1e12:,.1f} Tflop on each rank"
    if not speeds.known:
        return [f"a step is {operations}; --tflops, --intra-gbps and --inter-gbps bound its time"]
    time = step_time(plan, speeds)
    return [
        f"a step is {operations}: computing {time.compute:.2f} s, inside nodes {time.inside:.2f} "
        f"s, between nodes {time.between:.2f} s",
        f"so it takes at least {time.overlapped:.2f} s with perfect overlap, and at least "
        f"{time.serial:.2f} s without any",
    ]


def as_json(survey: Survey) -> str:
    """The plan as one JSON object, in bytes and seconds."""
    chosen = survey.decision.plan
    return json.dumps(
        {
            "model": survey.model,
            "capacity": survey.capacity and asdict(survey.capacity),
            "chosen": _plain(chosen, survey.speeds),
            "reason": survey.decision.reason,
            "warning": survey.decision.warning or None,
            "graphs": survey.graphs,
            "candidates": [
                {
                    "base": candidate.base,
                    "engine": candidate.engine,
                    "fits": candidate.fits,
                    "reason": candidate.reason,
                    "plan": candidate.plan and _plain(candidate.plan, survey.speeds),
                }
                for candidate in survey.candidates
            ],
        },
        indent=2,
    )


def _plain(plan: Plan, speeds: Speeds) -> dict[str, Any]:
    time = step_time(plan, speeds)
    return {
        **asdict(plan),
        "peak": plan.memory.peak,
        "seconds": {**asdict(time), "overlapped": time.overlapped, "serial": time.serial},
    }


def gb(nbytes: float) -> str:
    """Bytes in gigabytes, or in megabytes where those would show nothing."""
    if nbytes == 0:
        return "0"
    return f"{nbytes / 1e9:,.2f} GB" if nbytes >= 1e7 else f"{nbytes / 1e6:,.2f} MB"
