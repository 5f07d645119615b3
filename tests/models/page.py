"""docs/models.md from the rows of the table."""

from __future__ import annotations

import datetime
import importlib.metadata
from collections.abc import Mapping
from typing import Any

from .architectures import CAUSAL, Architecture, architectures
from .columns import COLUMNS

PACKAGES = ("torch", "transformers", "peft", "deepspeed", "bitsandbytes")
SHOWN = {"refused": "**no**", "class": "*class*", "✗": "**✗**"}
Row = Mapping[str, tuple[str, str]]  # {column: (mark, reason)}

_HEAD = """# Models

Every class of transformers' mapping of causal language models, and of the mapping of
image-text-to-text models with text alone, tiny and random, through the whole of dlora.
`make models-table` makes this page. `tests/models/` has the sizes (`tiny_configs.py`: by the names
of fields, so that classes of a newer transformers are found by themselves) and what a column
compares (`columns.py`: with transformers' class, PEFT or bitsandbytes, never with dlora itself).
`make test` checks a sample of the rows, `make test-full` all of them.

Made on {date} with {versions}: {count} of {all} classes.

| column | ✓ means | ✓ of those that the class can |
|---|---|---|
{columns}

✓ as above · **no** the command refuses it, before a weight is read, for the reason below ·
*class* transformers' class or PEFT cannot · **✗** it is wrong here · – there is nothing to compare

"""


def page(rows: Mapping[Architecture, Row]) -> str:
    """The whole page."""
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    text = _HEAD.format(
        date=datetime.date.today().isoformat(),
        versions=versions,
        count=len(rows),
        all=len(architectures()),
        columns="\n".join(_column(name, rows.values()) for name in COLUMNS),
    )
    reasons: dict[str, int] = {}
    causal = {a: row for a, row in rows.items() if a.auto == CAUSAL}
    composite = {a: row for a, row in rows.items() if a.auto != CAUSAL}
    for title, part in (("Causal language models", causal), ("Composite models", composite)):
        if part:
            text += f"## {title}\n\n{_rows(part, reasons)}\n\n"
    text += "## Reasons\n\n"
    return text + "\n".join(f"{number}. {reason}" for reason, number in reasons.items()) + "\n"


def rows_of(text: str) -> dict[Architecture, Row]:
    """The rows of a page that `page` made, of the architectures that there still are."""
    shown, _, listed = text.partition("## Reasons\n")
    reasons = dict(line.split(". ", 1) for line in listed.splitlines() if line)
    known = {(a.name, a.model_type): a for a in architectures()}
    rows: dict[Architecture, Row] = {}
    for line in shown.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        architecture = known.get((cells[0], cells[1])) if len(cells) == 2 + len(COLUMNS) else None
        if architecture:
            marks = (_mark(cell, reasons) for cell in cells[2:])
            rows[architecture] = dict(zip(COLUMNS, marks, strict=True))
    return rows


def share(column: str, rows: Any) -> tuple[int, int]:
    """(✓, all that the class does not make impossible) of a column."""
    marks = [row[column][0] for row in rows]
    return marks.count("✓"), sum(mark not in ("class", "–") for mark in marks)


def _column(name: str, rows: Any) -> str:
    good, possible = share(name, rows)
    doc = " ".join((COLUMNS[name].__doc__ or "").split()).replace("|", "\\|")
    return f"| {name} | {doc} | {good} of {possible} ({good / max(possible, 1):.0%}) |"


def _rows(rows: Mapping[Architecture, Row], reasons: dict[str, int]) -> str:
    lines = [f"| class | type | {' | '.join(COLUMNS)} |", "|---|---|" + ":-:|" * len(COLUMNS)]
    for architecture, row in rows.items():
        cells = [_cell(*row[name], reasons) for name in COLUMNS]
        lines.append(f"| {architecture.name} | {architecture.model_type} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(mark: str, reason: str, reasons: dict[str, int]) -> str:
    if mark in ("✓", "–"):
        return mark
    number = reasons.setdefault(reason, len(reasons) + 1)
    return f"{SHOWN[mark]} {number}"


def _mark(cell: str, reasons: Mapping[str, str]) -> tuple[str, str]:
    shown, _, number = cell.partition(" ")
    marks = {text: mark for mark, text in SHOWN.items()}
    return marks.get(shown, shown), reasons.get(number, "")
