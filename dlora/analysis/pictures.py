"""The plots of an analysis, as PNG.

updates.png         ‖ΔW‖/‖W0‖, effective rank and amplification, kinds by layers
directions.png      what W0 has of ΔW's directions, of its own largest and of random ones
spectra.png         the singular values of ΔW over the largest, by kind
similarity.png      φ(i, j) of two adapters, a mean over matrices
ranks.png           what AdaLoRA kept
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from dlora.analysis.against import Beside
from dlora.analysis.measured import Figures
from dlora.analysis.pruned import Kept
from dlora.analysis.summary import cells_of, groups
from dlora.methods.adalora_report import heat_map
from dlora.metrics.layer_grid import rows_and_columns

Cell = tuple[str, str]
_INCHES_OF_TEXT = 3.0


def draw(
    folder: Path,
    found: Mapping[str, Figures],
    rows: Mapping[str, Mapping[str, Any]],
    summarise: Callable[[list[str]], dict[str, Any]],
    beside: Mapping[str, Beside],
    kept: Kept | None,
) -> list[str]:
    """Write the plots; their names.

    Args:
        found: of every matrix.
        rows: summaries by kind.
        summarise: some matrices as one row.
        beside: of those that two adapters adapt.
    """
    figures = {
        "updates.png": _updates(found, summarise),
        "directions.png": _directions(rows),
        "spectra.png": _spectra(found),
    }
    if grids := [b for b in beside.values() if b.input is not None]:
        figures["similarity.png"] = _similarity(grids)
    if kept is not None:
        figures["ranks.png"] = heat_map(kept.ranks, kept.init_r)
    for name, figure in figures.items():
        figure.savefig(folder / name, dpi=130)
    return list(figures)


def mean_grid(grids: Sequence[Tensor]) -> Tensor:
    """The mean of φ [k₁, k₂] over matrices; where ranks differ, over those that have (i, j)."""
    shape = [max(grid.shape[dim] for grid in grids) for dim in (0, 1)]
    total, count = torch.zeros(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.float64)
    for grid in grids:
        own = tuple(slice(size) for size in grid.shape)
        total[own] += grid
        count[own] += 1
    return total / count


def _updates(found: Mapping[str, Figures], summarise: Callable[[list[str]], dict[str, Any]]) -> Any:
    from matplotlib.figure import Figure

    cells = {cell: summarise(names) for cell, names in cells_of(found).items()}
    kinds, layers = rows_and_columns(cells)
    width = max(5.0, 0.3 * len(layers) + _INCHES_OF_TEXT)
    panels = {
        "ratio": "|dW| / |W0|",
        "effective_rank": "effective rank",
        "amplification": "amplification |dW| / |U'W0V|",
    }
    height = max(1.6, 0.24 * len(kinds) + 0.8)
    figure = Figure(figsize=(width, height * len(panels)), layout="constrained")
    for number, (key, title) in enumerate(panels.items(), start=1):
        axes = figure.add_subplot(len(panels), 1, number)
        values = [[_or_nan(cells.get((kind, x), {}).get(key)) for x in layers] for kind in kinds]
        image = axes.imshow(values, cmap="viridis", aspect="auto")
        axes.set_xticks(range(len(layers)), layers, fontsize=7)
        axes.set_yticks(range(len(kinds)), kinds, fontsize=8)
        axes.set_title(title, fontsize=9)
        figure.colorbar(image, ax=axes, pad=0.01)
    axes.set_xlabel("layer")
    return figure


def _directions(rows: Mapping[str, Mapping[str, Any]]) -> Any:
    from matplotlib.figure import Figure

    live = {kind: row for kind, row in rows.items() if "top" in row}
    figure = Figure(figsize=(max(5.0, 1.1 * len(live) + 2), 3.9), layout="constrained")
    axes = figure.add_subplot()
    bars = {
        "top": "largest of W0",
        "update": "|dW|",
        "projection": "of dW",
        "random": "random",
    }
    for number, (key, label) in enumerate(bars.items()):
        places = [x + 0.2 * (number - 1.5) for x in range(len(live))]
        axes.bar(places, [row[key] for row in live.values()], width=0.18, label=label)
    axes.set_yscale("log")
    axes.set_xticks(range(len(live)), list(live), fontsize=8, rotation=20, ha="right")
    axes.set_title("|dW|, and |U'W0V| of the directions U, V", fontsize=9)
    figure.legend(fontsize=8, loc="outside lower center", ncols=len(bars))
    return figure


def _spectra(found: Mapping[str, Figures]) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.0, 3.6), layout="constrained")
    axes = figure.add_subplot()
    for kind, names in groups(found, 0).items():
        spectra = [found[name].sigma for name in names if found[name].sigma]
        most = max(map(len, spectra), default=0)
        middle = [median(s[i] / s[0] for s in spectra if len(s) > i) for i in range(most)]
        axes.plot(range(1, most + 1), middle, marker=".", label=kind)
    axes.set_yscale("log")
    axes.set_xlabel("i")
    axes.set_title("singular values of dW over the largest, median over layers", fontsize=9)
    axes.legend(fontsize=7)
    return figure


def _similarity(beside: Collection[Beside]) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.4, 3.8), layout="constrained")
    for number, side in enumerate(("input", "output"), start=1):
        grid = mean_grid([getattr(each, side) for each in beside])
        axes = figure.add_subplot(1, 2, number)
        k1, k2 = grid.shape
        image = axes.imshow(
            grid.tolist(),
            cmap="viridis",
            vmin=0,
            vmax=1,
            aspect="auto",
            extent=(0.5, k2 + 0.5, k1 + 0.5, 0.5),
        )
        axes.set_title(f"similarity of the {side} spaces", fontsize=9)
        axes.set_xlabel("j, of --against")
        axes.set_ylabel("i, of --adapter")
        figure.colorbar(image, ax=axes, pad=0.01)
    return figure


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value
