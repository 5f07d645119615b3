"""The rank of every matrix over time: AdaLoRA's masks as grids of colours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dlora.metrics.layer_grid import rows_and_columns, table_of
from dlora.report.numbers import shown
from dlora.report.run_files import RunFiles

LEVELS = 10  # shades of the page above the one for 0
MOST_STEPS = 48  # of a run's masks, evenly spread, the first and the last included
MOST_CELLS = 4_000  # matrices of a picture
CELL = 10  # of a drawing before it is stretched


@dataclass(frozen=True)
class Bands:
    """Mean ranks by kind or by layer (rows) over the masks (columns)."""

    title: str
    rows: list[str]
    steps: list[int]
    means: list[list[float | None]]  # by row, then by step
    top: int

    @property
    def width(self) -> int:
        """Of the drawing."""
        return CELL * len(self.steps)

    @property
    def height(self) -> int:
        """Of the drawing."""
        return CELL * len(self.rows)

    def paths(self) -> list[tuple[int, str]]:
        """(shade, the cells of it) as one path each."""
        found: dict[int, list[str]] = {}
        for y, row in enumerate(self.means):
            for x, mean in enumerate(row):
                if mean is not None:
                    word = f"M{x * CELL} {y * CELL}h{CELL}v{CELL}h-{CELL}z"
                    found.setdefault(shade(mean, self.top), []).append(word)
        return [(level, "".join(words)) for level, words in sorted(found.items())]

    def table(self) -> list[tuple[str, list[str]]]:
        """(row, its means at some masks)."""
        return [(name, [self._word(row[i]) for i in self._some()]) for name, row in self._named()]

    def table_steps(self) -> list[str]:
        """The steps of the table."""
        return [f"{self.steps[i]:,}" for i in self._some()]

    def hover(self) -> dict[str, Any]:
        """What the script shows."""
        words = [[self._word(mean) for mean in row] for row in self.means]
        return {"rows": self.rows, "steps": [f"{s:,}" for s in self.steps], "text": words}

    def _named(self) -> list[tuple[str, list[float | None]]]:
        return list(zip(self.rows, self.means, strict=True))

    def _some(self) -> list[int]:
        return evenly(len(self.steps), 10)

    @staticmethod
    def _word(mean: float | None) -> str:
        return "" if mean is None else shown(round(mean, 2))


@dataclass(frozen=True)
class RankGrid:
    """One run's: the table of the last mask, which the page can show for every other, and two
    drawings over time."""

    run: str
    kinds: list[str]
    layers: list[str]
    steps: list[int]
    ranks: list[list[list[int | None]]]  # by step, kind and layer
    top: int
    total: list[int]  # ranks kept, by step

    @property
    def last(self) -> list[tuple[str, list[tuple[int | None, int]]]]:
        """(kind, (rank, shade) by layer) of the last mask."""
        last = self.ranks[-1]
        return [
            (kind, [(rank, shade(rank, self.top)) for rank in row])
            for kind, row in zip(self.kinds, last, strict=True)
        ]

    def bands(self) -> list[Bands]:
        """By layer and by kind."""
        by_kind = [[_mean(mask[k]) for mask in self.ranks] for k in range(len(self.kinds))]
        by_layer = [
            [_mean([row[i] for row in mask]) for mask in self.ranks]
            for i in range(len(self.layers))
        ]
        layers = [f"layer {name}" if name != "-" else "outside layers" for name in self.layers]
        return [
            Bands("Mean rank of each layer over steps", layers, self.steps, by_layer, self.top),
            Bands("Mean rank of each kind over steps", self.kinds, self.steps, by_kind, self.top),
        ]

    def hover(self) -> dict[str, Any]:
        """What the script needs to show another mask; a cell without a matrix is -1."""
        flat = [[-1 if r is None else r for row in mask for r in row] for mask in self.ranks]
        kept = [f"step {s:,}: {n:,} kept" for s, n in zip(self.steps, self.total, strict=True)]
        return {"captions": kept, "ranks": flat, "top": self.top, "levels": LEVELS}


def grids_of(runs: Sequence[RunFiles]) -> list[RankGrid]:
    """Of the runs that have masks."""
    return [grid_of(run) for run in runs if run.ranks]


def grid_of(run: RunFiles) -> RankGrid:
    """The grid of a run that has masks."""
    steps = sorted(run.ranks)
    steps = [steps[i] for i in evenly(len(steps), MOST_STEPS)]
    tables = [table_of(run.ranks[step])[2] for step in steps]
    kinds, layers = rows_and_columns(dict.fromkeys(place for cells in tables for place in cells))
    if len(kinds) * len(layers) > MOST_CELLS:
        run.notes.append(
            f"ranks.json: of {len(kinds)} kinds by {len(layers)} layers the grid shows a part"
        )
        layers = layers[:200]
        kinds = kinds[: max(1, MOST_CELLS // len(layers))]
    ranks = [[[cells.get((k, l)) for l in layers] for k in kinds] for cells in tables]  # noqa: E741
    top = max((r for mask in ranks for row in mask for r in row if r is not None), default=0)
    total = [sum(run.ranks[step].values()) for step in steps]
    return RankGrid(run.name, kinds, layers, steps, ranks, top, total)


def shade(rank: float | None, top: int) -> int:
    """0 for no rank, else 1 … LEVELS; -1 where there is no matrix."""
    if rank is None:
        return -1
    return 0 if rank <= 0 or top <= 0 else max(1, min(LEVELS, round(LEVELS * rank / top)))


def evenly(count: int, most: int) -> list[int]:
    """At most `most` of `count` places, evenly spread, with the first and the last."""
    if count <= most:
        return list(range(count))
    return sorted({round(i * (count - 1) / (most - 1)) for i in range(most)})


def _mean(ranks: Sequence[int | None]) -> float | None:
    there = [rank for rank in ranks if rank is not None]
    return sum(there) / len(there) if there else None
