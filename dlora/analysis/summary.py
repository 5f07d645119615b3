"""The figures of many matrices as one row, by kind and by layer, and the printed tables.

‖ΔW‖, ‖W0‖, projections     √Σ of the squares, as of one block-diagonal matrix
energy                      Σσ² of a row over that of all
ranks, φ                    means over the matrices whose ΔW is not 0
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from statistics import mean
from typing import Any

from dlora.analysis.against import Beside
from dlora.analysis.measured import Figures
from dlora.metrics.layer_grid import kind_and_layer, rows_and_columns

Cells = dict[tuple[str, str], list[str]]  # {(kind, layer): names of its matrices}


def cells_of(names: Iterable[str]) -> Cells:
    """Matrices by kind and layer; those of a stack of experts are of one kind."""
    cells: Cells = {}
    for name in names:
        cells.setdefault(kind_and_layer(name.partition("[")[0]), []).append(name)
    return cells


def groups(names: Collection[str], which: int) -> dict[str, list[str]]:
    """Matrices by kind (0) or by layer (1)."""
    cells = cells_of(names)
    ordered = rows_and_columns(cells)[which]
    return {
        group: [name for cell, own in cells.items() if cell[which] == group for name in own]
        for group in ordered
    }


def summary(found: Collection[Figures], energy: float) -> dict[str, Any]:
    """One row of several matrices.

    Args:
        energy: Σ‖ΔW‖² of all.
    """
    live = [figures for figures in found if figures.sigma]
    update, base = (_root(getattr(f, name) for f in found) for name in ("update", "base"))
    row: dict[str, Any] = {
        "matrices": len(found),
        "r": mean(figures.r for figures in found),
        "update": update,
        "base": base,
        "ratio": update / base if base else None,
        "energy": update**2 / energy if energy else 0.0,
    }
    if not live:
        return row
    row |= {name: mean(getattr(f, name) for f in live) for name in ("effective_rank", "rank_90")}
    projected, top, random = (
        _root(getattr(f, name) for f in live) for name in ("projection", "top", "random")
    )
    row |= {"projection": projected, "top": top, "random": random}
    row["amplification"] = update / projected if projected else None
    for name in ("phi_input", "phi_output"):
        row[name] = _mean(getattr(f, name) for f in live)
    return row


def beside_summary(found: Collection[Beside]) -> dict[str, Any]:
    """One row of several matrices that two adapters adapt."""
    records = [beside.record() for beside in found if beside.cosine is not None]
    row: dict[str, Any] = {"matrices": len(found)}
    if records:
        row["cosine"] = mean(record["cosine"] for record in records)
        for side in ("input", "output"):
            row[side] = {
                key: mean(record[side][key] for record in records)
                for key in ("first", "all", "random")
            }
    return row


def table(title: str, rows: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """The lines of the table of `summary`'s rows."""
    heads = ["matrices", "r", "|dW|/|W0|", "energy", "eff. rank", "r of 90%", "amplified"]
    heads += ["|U'W0V|", "top of W0", "random"]
    body: dict[str, list[str]] = {}
    for name, row in rows.items():
        body[name] = [
            str(row["matrices"]),
            f"{row['r']:.4g}",
            _shown(row.get("ratio")),
            f"{row['energy']:.1%}",
            _shown(row.get("effective_rank"), 3),
            _shown(row.get("rank_90"), 3),
            *(_shown(row.get(key)) for key in ("amplification", "projection", "top", "random")),
        ]
    yield from _lines(title, heads, body)


def beside_table(title: str, rows: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """The lines of the table of `beside_summary`'s rows."""
    heads = ["matrices", "cosine"]
    heads += [f"{side} {what}" for side in ("in", "out") for what in ("first", "all", "random")]
    body: dict[str, list[str]] = {}
    for name, row in rows.items():
        body[name] = [str(row["matrices"]), _shown(row.get("cosine"))]
        for side in ("input", "output"):
            part = row.get(side, {})
            body[name] += [_shown(part.get(key)) for key in ("first", "all", "random")]
    yield from _lines(title, heads, body)


def by_groups(
    names: Collection[str], which: int, row: Callable[[list[str]], dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """{kind or layer: its row}."""
    return {group: row(own) for group, own in groups(names, which).items()}


def _lines(title: str, heads: list[str], body: Mapping[str, list[str]]) -> Iterator[str]:
    """Columns as wide as what is in them."""
    wide = max(map(len, (title, *body)))
    sizes = [max(map(len, column)) for column in zip(heads, *body.values(), strict=True)]
    for name, values in {title: heads, **body}.items():
        cells = (f"{value:>{size}}" for value, size in zip(values, sizes, strict=True))
        yield "  ".join([f"{name:<{wide}}", *cells])


def _shown(value: float | None, digits: int = 4) -> str:
    return "-" if value is None else f"{value:.{digits}g}"


def _root(values: Iterable[float]) -> float:
    return math.sqrt(sum(value**2 for value in values))


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return mean(known) if known else None
