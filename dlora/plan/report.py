"""A plan in words: the lines before the first step, the table of placements, the closing table."""

from __future__ import annotations

from collections.abc import Sequence

from dlora.plan.choose import HELD_WITHIN, Decision
from dlora.plan.measured import Measured
from dlora.plan.plan import Plan
from dlora.sharding.replica.reducing import AUDIT_EVERY


def lines_of(decision: Decision, *, is_open: bool) -> list[str]:
    """The lines of the plan that are printed before the first step.

    Args:
        is_open: whether the placement was chosen here, so that the reason is printed.
    """
    plan = decision.plan
    p, m, t = plan.placement, plan.memory, plan.traffic
    where = "a whole copy" if p.shard_size == 1 else f"1/{p.shard_size}"
    lines = [
        f"placement       base: {p.base}, engine: {p.engine}, {plan.topology.world} rank(s), "
        f"{where} of W0 on each",
        f"W0              {mb(m.base_held)} of {mb(m.base_total)} per rank, "
        f"at most {mb(m.base_gathered)} more while gathered",
        f"A and B         {plan.trainable:,} parameters; with gradients and optimizer state "
        f"{mb(m.replica)} per rank",
        f"activations     {activations_of(plan)}",
        f"peak memory     {mb(m.peak)} per rank, with an allowance of {mb(m.allowance)} for "
        "process and allocator",
        f"wire, per step  {mb(plan.gathers)} gathering W0 + {mb(plan.reduction)} reducing "
        f"gradients, sent by each rank; {plan.audit} bytes every {AUDIT_EVERY}th for the audit"
        + (f"; {t.mask.rank:,.0f} bytes for the scores of a mask" if t.mask.rank else ""),
    ]
    if m.teacher:
        lines.insert(
            2,
            f"teacher         {mb(m.teacher)} per rank, at most {mb(m.teacher_gathered)} more "
            "while it is gathered",
        )
    if is_open:
        lines.insert(1, f"chosen          base: {p.base}: {decision.reason}")
    if plan.resident or (is_open and p.shard_size > 1):
        lines.append(f"resident        {resident_of(plan)}{_within(decision, is_open=is_open)}")
    if plan.topology.nodes > 1:
        lines.append(
            f"between nodes   {mb(t.between)} per step over each node's link, each way "
            f"({mb(t.gathers.between)} of W0)"
        )
    if decision.warning:
        lines.append(f"warning         {decision.warning}")
    return lines


def activations_of(plan: Plan) -> str:
    """What a micro-batch takes, in a line."""
    w, a = plan.workload, plan.memory.activations
    busiest = max(a.blocks, a.loss)
    told = (
        f"{mb(busiest)} at most for {w}, of these {mb(a.saved)} kept "
        f"from forward to backward ({w.checkpointing})"
    )
    return f"{told}; estimated: {a.estimated}" if a.estimated else told


def resident_of(plan: Plan) -> str:
    """The layers that stay gathered, and what that saves, in a line."""
    if not plan.resident:
        return "no layer stays gathered"
    paths = [path or "the root's own" for path in plan.resident]
    shown = ", ".join(paths[:2]) + (f", ..., {paths[-1]}" if len(paths) > 2 else "")
    return (
        f"{len(paths)} layers, {mb(plan.memory.resident)} of W0, stay gathered on each rank: "
        f"{shown}; saves {mb(plan.spared)} of gathers per step"
    )


def _within(decision: Decision, *, is_open: bool) -> str:
    """The margin within which layers stay gathered without being asked."""
    capacity = decision.capacity
    if capacity is None or capacity.is_budget or not is_open:
        return ""
    most = mb(HELD_WITHIN * capacity.nbytes)
    return (
        f"; while the peak is at most {most}, {HELD_WITHIN:.0%} of {mb(capacity.nbytes)} "
        f"({capacity.source})"
    )


def comparison(plan: Plan, measured: Measured, device: str) -> str:
    """Planned against measured, as a run prints it at its end."""
    pruned = " (pruned)" if measured.pruned else ""
    names = {
        "wire": "wire per step, median",
        "base": "W0 held",
        "replica": f"A, B, gradients, state{pruned}",
        "peak": "peak memory",
    }
    before, found = planned_bytes(plan, device), measured_bytes(measured)
    table = [("per rank", "planned", "measured", "measured/planned")]
    for key, name in names.items():
        planned, taken = before[key], found[key]
        ratio = f"{taken / planned:.3f}" if planned else "-"
        table.append((name, mb(planned), mb(taken), ratio))
    return "\n".join(columns(table))


def planned_bytes(plan: Plan, device: str) -> dict[str, int]:
    """What a plan says of a rank: bytes by the names of `measured_bytes`."""
    # CUDA's figure is what its allocator gave out, without holes and the process.
    peak = plan.memory.in_use if device == "cuda" else plan.memory.peak
    sent = plan.gathers + plan.reduction
    return {"wire": sent, "base": plan.base_held, "replica": plan.memory.replica, "peak": peak}


def measured_bytes(measured: Measured) -> dict[str, float]:
    """Bytes of a rank: sent per step, stored of W0, of A, B, gradients and state, and the most."""
    return {name: getattr(measured, name) for name in ("wire", "base", "replica", "peak")}


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows as text: the first column on the left, figures on the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append("  ".join([row[0].ljust(widths[0]), *cells[1:]]).rstrip())
    return lines


def mb(nbytes: float) -> str:
    """Bytes in megabytes."""
    return f"{nbytes / 1e6:,.1f} MB"
