"""The choice of `base: auto`: the cheapest placement that fits the memory, and why."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from dlora.config.recompute import ways
from dlora.errors import UsageError
from dlora.plan.plan import Plan, Subject
from dlora.plan.state import modes
from dlora.sharding.topology import Topology, resolve_placement

USABLE = 0.95  # of free memory: other processes need some as well
HELD_WITHIN = 0.9  # of that, the peak with layers that nobody has asked to keep gathered
Cost = Callable[[Plan], tuple[float, ...]]


@dataclass(frozen=True)
class Capacity:
    """Memory that a rank may take.

    Args:
        nbytes: its size.
        source: where the figure comes from, for a reader.
        is_budget: the user has set it, so what is spare keeps layers resident, and what does not
            fit is refused.
    """

    nbytes: int
    source: str
    is_budget: bool = False


def capacity_of(budget_gb: float | None, free: int | None) -> Capacity | None:
    """The user's budget in GB (10^9 bytes), or else most of what is free, if that is known."""
    if budget_gb is not None:
        return Capacity(round(budget_gb * 1e9), "sharding.memory_budget_gb", is_budget=True)
    if free is None:
        return None
    return Capacity(int(USABLE * free), f"{USABLE:.0%} of the free memory")


@dataclass(frozen=True)
class Candidate:
    """One row of the table: a placement with its plan, or why there is none."""

    engine: str
    base: str
    plan: Plan | None
    fits: bool
    reason: str


@dataclass(frozen=True)
class Decision:
    """What was chosen among which candidates, and why.

    Attributes:
        capacity: of a rank, if it is known.
        holding: the plan with other resident layers, by their paths.
        warning: why it may not fit.
    """

    plan: Plan
    candidates: list[Candidate]
    reason: str
    capacity: Capacity | None
    holding: Callable[[Collection[str]], Plan]
    warning: str = ""


def bytes_first(plan: Plan) -> tuple[float, ...]:
    """The cost of a plan: bytes sent between nodes, then those inside them."""
    return plan.traffic.between, plan.traffic.inside


def candidates(
    subject: Subject,
    topology: Topology,
    *,
    engine: str,
    base: str,
    capacity: Capacity | None,
    divided: bool = False,
    offload: bool = False,
) -> list[Candidate]:
    """A row for each placement that `base` allows; on one node, `node` would equal `world`."""
    places = ("none", "node", "world") if topology.nodes > 1 else ("none", "world")
    found = []
    for place in places if base == "auto" else (base,):
        try:
            placement = resolve_placement(engine, place, topology, offload=offload)
            subject.check(placement)
            if capacity is not None and capacity.is_budget:
                plan = subject.plan_within(placement, topology, capacity.nbytes, divided=divided)
            else:
                plan = subject.plan(placement, topology, divided=divided)
        except UsageError as error:
            found.append(Candidate(engine, place, None, False, str(error)))
            continue
        need = f"needs {_gb(plan.memory.peak)}"
        fits = capacity is None or plan.memory.peak <= capacity.nbytes
        found.append(Candidate(engine, place, plan, fits, need))
    return found


def decide(
    subject: Subject,
    topology: Topology,
    *,
    engine: str,
    base: str,
    optimizer_state: str,
    capacity: Capacity | None,
    offload: bool = False,
    checkpointing: Any = None,
    fills: bool | None = None,
    cost: Cost = bytes_first,
) -> Decision:
    """Choose among the placements that the settings leave open.

    The optimizer state is divided (`optimizer_state: auto`), and activations are recomputed
    (`activation_checkpointing: auto`), only where nothing fits otherwise.

    Args:
        checkpointing: the setting; None: as the subject's workload says.
        base: `"none"`, `"node"`, `"world"`, or `"auto"` for any of them.
        capacity: None if nothing is known: everything fits.
        fills: whether memory that is free keeps layers gathered, where there is no budget; None: if
            `base` is `"auto"`.

    Raises:
        UsageError: no placement is possible, or none fits a budget.
    """
    own = subject.workload.checkpointing
    for how in (own,) if checkpointing is None else ways(checkpointing, subject.device):
        current, seen = subject.recomputing(how), list[Candidate]()
        for divided in modes(subject.workload, optimizer_state, topology.world):
            found = candidates(
                current,
                topology,
                engine=engine,
                base=base,
                capacity=capacity,
                divided=divided,
                offload=offload,
            )
            seen += found
            fitting = [c.plan for c in found if c.plan is not None and c.fits]
            if fitting:
                plan = min(fitting, key=cost)
                why = _reason(plan, seen, base, capacity)
                if capacity is not None and (base == "auto" if fills is None else fills):
                    plan = _filled(current, plan, capacity)
                return Decision(plan, seen, why, capacity, _holder(current, plan))
    return _smallest(current, seen, capacity)


def _filled(subject: Subject, plan: Plan, capacity: Capacity) -> Plan:
    """The same placement, with the layers that what is free keeps gathered."""
    if capacity.is_budget:
        return plan
    most = int(HELD_WITHIN * capacity.nbytes)
    return subject.plan_within(plan.placement, plan.topology, most, divided=plan.divided)


def _holder(subject: Subject, plan: Plan) -> Callable[[Collection[str]], Plan]:
    return lambda held: subject.plan(plan.placement, plan.topology, divided=plan.divided, held=held)


def _smallest(subject: Subject, seen: list[Candidate], capacity: Capacity | None) -> Decision:
    """What is left where nothing fits."""
    possible = [c.plan for c in seen if c.plan is not None]
    if not possible or capacity is None:
        raise UsageError("; ".join(dict.fromkeys(c.reason for c in seen)))
    least = min(possible, key=lambda plan: plan.memory.peak)
    needs = _gb(least.memory.peak)
    if capacity.is_budget:
        raise UsageError(
            f"{capacity.source}: {_gb(capacity.nbytes)} per rank is not enough; the other settings "
            f"need at least {needs}, with {_named(least)}"
        )
    warning = f"it needs {needs}, and a rank has {_gb(capacity.nbytes)} ({capacity.source})"
    held = _holder(subject, least)
    return Decision(least, seen, "it takes the least memory", capacity, held, warning)


def _reason(plan: Plan, seen: list[Candidate], base: str, capacity: Capacity | None) -> str:
    if base != "auto":
        reason = "as set"
    elif capacity is None:
        reason = "the fewest bytes on the wire"
    else:
        others = [f"{c.base} {c.reason}" if c.plan else c.reason for c in seen if not c.fits]
        reason = f"the cheapest that fits {_gb(capacity.nbytes)} ({capacity.source})"
        reason = "; ".join([reason, *dict.fromkeys(others)])
    if plan.divided and any(c.plan is not None and not c.plan.divided for c in seen):
        reason += "; the optimizer state is divided, since nothing fits otherwise"
    return reason


def _named(plan: Plan) -> str:
    name = f"base: {plan.placement.base}"
    return f"{name} with a divided optimizer state" if plan.divided else name


def _gb(nbytes: float) -> str:
    return f"{nbytes / 1e9:,.2f} GB"
