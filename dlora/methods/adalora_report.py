"""`ranks.json` and its picture: how AdaLoRA's budget is spread over the modules.

ranks.json   {step: {module: rank kept}} for every mask
ranks.png    layers from left to right, kinds of matrices from top to bottom, rank as colour
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dlora.io.files import write_atomically
from dlora.lora.variants.adalora import AdaLoraAdapter
from dlora.metrics.layer_grid import table_of

RANKS, PICTURE = AdaLoraAdapter.run_files
Masks = dict[int, dict[str, int]]


def read_masks(directory: Path, *, until: int) -> Masks:
    """The masks up to a step, of an earlier start of the run; none where the file is not whole."""
    try:
        found = json.loads((directory / RANKS).read_text(encoding="utf-8"))
        return {int(step): ranks for step, ranks in found.items() if int(step) <= until}
    except (OSError, ValueError, AttributeError):
        return {}


def write_masks(directory: Path, masks: Masks) -> None:
    """Write all masks, in the order of their steps."""
    ordered = {str(step): masks[step] for step in sorted(masks)}
    write_atomically(directory / RANKS, (json.dumps(ordered) + "\n").encode())


def heat_map(ranks: Mapping[str, int], init_r: int) -> Any:
    """The picture of the ranks as a matplotlib figure."""
    from matplotlib.figure import Figure

    rows, columns, cells = table_of(ranks)
    width, height = max(5.0, 0.32 * len(columns) + 2.8), max(2.2, 0.36 * len(rows) + 1.3)
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    values = [[cells.get((row, column), float("nan")) for column in columns] for row in rows]
    image = axes.imshow(values, cmap="viridis", vmin=0, vmax=init_r, aspect="auto")
    for y, row in enumerate(rows):
        for x, column in enumerate(columns):
            if (rank := cells.get((row, column))) is not None:
                ink = "white" if rank < 0.6 * init_r else "black"
                axes.text(x, y, str(rank), ha="center", va="center", color=ink, fontsize=7)
    axes.set_xticks(range(len(columns)), columns, fontsize=7)
    axes.set_yticks(range(len(rows)), rows, fontsize=8)
    axes.set_xlabel("layer")
    kept, all_of_them = sum(ranks.values()), init_r * len(ranks)
    axes.set_title(f"AdaLoRA: {kept:,} of {all_of_them:,} triplets kept", fontsize=9)
    figure.colorbar(image, ax=axes, label="rank kept", pad=0.01)
    return figure


def write_picture(directory: Path, figure: Any) -> Path:
    """Write the picture as PNG."""
    beside = directory / f".{PICTURE}.tmp"
    figure.savefig(beside, dpi=130, format="png")
    beside.replace(directory / PICTURE)
    return directory / PICTURE
