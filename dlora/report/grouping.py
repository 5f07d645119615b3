"""Which figures share a chart, and in which section: every figure of a log has its place.

A figure that no rule knows gets a chart of its own among the other figures.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

LOSS, OPTIMISATION, OBJECTIVE, FORGETTING, HELD_OUT, METHOD, SPEED, MEMORY, OTHER = SECTIONS = (
    "Loss",
    "Optimisation",
    "Objective",
    "Forgetting",
    "Evaluation",
    "Method",
    "Throughput and padding",
    "Memory and wire",
    "Other figures",
)


@dataclass(frozen=True)
class Rule:
    """Figures whose whole name matches; those of one `chart` share it, without one each has its
    own, with its `eval_…` beside it.

    Attributes:
        from_zero: the axis begins at 0.
    """

    section: str
    pattern: str
    chart: str = ""
    note: str = ""
    from_zero: bool = False


RULES = (
    Rule(LOSS, r"loss|eval_loss", "Loss", "mean over target tokens; eval_loss: held-out"),
    Rule(OPTIMISATION, r"lr", "Learning rate"),
    Rule(OPTIMISATION, r"grad_norm", "Gradient norm", "before clipping"),
    Rule(OBJECTIVE, r"(eval_)?rewards?[_/](chosen|rejected)", "Rewards"),
    Rule(OBJECTIVE, r"(eval_)?(rewards?[_/])?margins?", "Margin"),
    Rule(OBJECTIVE, r"(rewards?[_/])?accurac(y|ies)", "Accuracy"),
    Rule(OBJECTIVE, r"(eval_)?logps?[_/](chosen|rejected).*", "Log-probabilities"),
    Rule(OBJECTIVE, r"(eval_)?(rewards?[_/].*|logps?[_/].*|kl|reference_kl)"),
    Rule(FORGETTING, r"(eval_)?forget_(base_)?nll.*", "NLL of the retained set"),
    Rule(OBJECTIVE, r"(eval_)?(ce|sft|distill.*)"),
    Rule(FORGETTING, r"(eval_)?forget.*"),
    Rule(METHOD, r"budget|kept_ranks", "Budget and ranks kept", from_zero=True),
    Rule(METHOD, r"orth_loss|aux_loss|kept_params|gates.*"),
    Rule(SPEED, r"tokens_per_second|all_tokens_per_second", "Tokens per second", from_zero=True),
    Rule(SPEED, r".*_per_second.*", from_zero=True),
    Rule(SPEED, r"step_seconds", "Seconds of a step", from_zero=True),
    Rule(SPEED, r"padding", "Padding", "share of the computed positions", from_zero=True),
    Rule(SPEED, r"mfu", "Share of the peak (MFU)", from_zero=True),
    Rule(SPEED, r"tokens|all_tokens", "Tokens of a step", from_zero=True),
    Rule(MEMORY, r"peak_memory_bytes", "Peak memory", "highest over ranks", from_zero=True),
    Rule(MEMORY, r"wire_bytes", "Wire bytes of a step", "sent by rank 0", from_zero=True),
    Rule(MEMORY, r".*_bytes", from_zero=True),
    Rule(HELD_OUT, r"eval_.*"),
)


@dataclass
class Group:
    """The figures of one chart, by their names in the log."""

    section: str
    title: str
    note: str = ""
    from_zero: bool = False
    names: list[str] = field(default_factory=list)


def grouped(names: Iterable[str]) -> list[Group]:
    """Every name in one group, groups in the order of the sections and of the rules."""
    known = list(dict.fromkeys(names))
    groups: dict[tuple[int, int, str], Group] = {}
    for name in known:
        place, rule = _rule(name)
        plain = name.removeprefix("eval_")
        if plain != name and plain in known and rule.section == HELD_OUT:
            place, rule = _rule(plain)
        own = plain if plain in known else name
        key = (SECTIONS.index(rule.section), place, rule.chart or own)
        if key not in groups:
            groups[key] = Group(rule.section, rule.chart or own, rule.note, rule.from_zero)
        groups[key].names.append(name)
    for group in groups.values():
        group.names.sort(key=lambda name: name.startswith("eval_"))
    return [groups[key] for key in sorted(groups, key=lambda key: key[:2])]


def _rule(name: str) -> tuple[int, Rule]:
    for place, rule in enumerate(RULES):
        if re.fullmatch(rule.pattern, name, re.DOTALL):
            return place, rule
    return len(RULES), Rule(OTHER, "")
