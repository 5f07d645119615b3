"""`dlora analyse`: what an adapter learned, matrix by matrix, beside W0 and beside another adapter.

DIR/analysis.json             every figure, by matrix, kind and layer
DIR/similarity.safetensors    φ(i, j) of each matrix, `NAME.input` and `NAME.output`; with --against
DIR/*.png                     plots

In memory are one W0 in float32, a few blocks, the two factors of one update, and the results.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dlora.analysis.against import Beside, compare
from dlora.analysis.measured import Figures, directions, measure
from dlora.analysis.opened import Opened, OpenedBase, open_all
from dlora.analysis.pictures import draw
from dlora.analysis.pruned import Kept, kept_by
from dlora.analysis.summary import beside_summary, beside_table, by_groups, summary, table
from dlora.analysis.whole import moved
from dlora.cli import new_target
from dlora.errors import UsageError, and_more
from dlora.io.files import new_directory, path_of, write_atomically
from dlora.io.safetensors import new_float_tensor, write_tensors
from dlora.library.store import Library
from dlora.runtime.arguments import OneLineParser
from dlora.runtime.exit_status import exit_with
from dlora.runtime.memory import trim

RESULT, GRIDS = "analysis.json", "similarity.safetensors"


def main(argv: list[str]) -> int:
    """The command; returns the exit status."""
    args = _parser().parse_args(argv)
    library = Library(path_of(args.library, "--library")) if args.library else None
    target = new_target(args.to)
    first, second, base = open_all(
        args.adapter,
        args.against,
        args.base,
        library,
        trust_remote_code=args.trust_remote_code,
        announce=print,
    )
    found = analyse(first, second, base, print)
    for line in lines(found):
        print(line)
    try:
        with new_directory(target) as folder:
            write(found, folder)
    except OSError as error:
        raise UsageError(f"--to: cannot write {args.to}: {error.strerror or error}") from error
    print(f"wrote {args.to}")
    return 0


@dataclass
class Analysis:
    """All that was found.

    Attributes:
        figures: by matrix.
        beside: by matrix that both adapters adapt.
        alone: matrices of --against that --adapter does not adapt.
        whole: {parameter that is trained whole: its norms}.
    """

    adapter: Path
    base: str
    against: Path | None = None
    figures: dict[str, Figures] = field(default_factory=dict)
    beside: dict[str, Beside] = field(default_factory=dict)
    alone: list[str] = field(default_factory=list)
    whole: dict[str, dict[str, Any]] = field(default_factory=dict)
    kept: Kept | None = None

    def row(self, names: list[str]) -> dict[str, Any]:
        """Some matrices as one row."""
        energy = sum(figures.update**2 for figures in self.figures.values())
        return summary([self.figures[name] for name in names], energy)

    def beside_row(self, names: list[str]) -> dict[str, Any]:
        """Some matrices of both adapters as one row."""
        return beside_summary([self.beside[name] for name in names])

    def record(self) -> dict[str, Any]:
        """As JSON."""
        names = list(self.figures)
        content: dict[str, Any] = {
            "adapter": str(self.adapter),
            "base": self.base,
            "all": self.row(names),
            "kinds": by_groups(names, 0, self.row),
            "layers": by_groups(names, 1, self.row),
            "matrices": {name: figures.record() for name, figures in self.figures.items()},
            "whole": self.whole,
            "adalora": self.kept and self.kept.record(),
        }
        if self.against is not None:
            both = list(self.beside)
            content["against"] = {
                "adapter": str(self.against),
                "all": self.beside_row(both),
                "kinds": by_groups(both, 0, self.beside_row),
                "layers": by_groups(both, 1, self.beside_row),
                "matrices": {name: beside.record() for name, beside in self.beside.items()},
                "only in adapter": [name for name in names if name not in self.beside],
                "only in against": self.alone,
            }
        return content


@torch.no_grad()
def analyse(
    first: Opened, second: Opened | None, base: OpenedBase, announce: Callable[[str], None]
) -> Analysis:
    """Measure all matrices, one at a time.

    Raises:
        UsageError: no update is other than 0, or the two adapters have no matrix in common.
    """
    made = Analysis(first.source.directory, base.base.path)
    matrices = list(first.matrices())
    others = {matrix.name: matrix for matrix in second.matrices()} if second else {}
    if second is not None:
        made.against = second.source.directory
        both = [matrix.name for matrix in matrices if matrix.name in others]
        made.alone = [name for name in others if name not in {m.name for m in matrices}]
        if not both:
            raise UsageError(
                f"--against: {made.against} adapts no matrix that {made.adapter} adapts"
            )
    announce(f"base: {made.base}; {len(matrices)} matrices")
    for matrix in matrices:
        update = first.update(matrix)
        found = directions(update)
        made.figures[matrix.name] = measure(update.r, found, base.read(matrix))
        if second is not None and matrix.name in others:
            other = directions(second.update(others[matrix.name]))
            made.beside[matrix.name] = compare(matrix.m, matrix.n, found, other)
        trim()  # or the memory of one matrix adds to that of the next
    made.whole = moved(first, base)
    if not any(figures.sigma for figures in made.figures.values()):
        raise UsageError(f"--adapter: {made.adapter}: every update B·A is 0: train it first")
    made.kept = kept_by(first, {name: figures.r for name, figures in made.figures.items()})
    return made


def lines(made: Analysis) -> list[str]:
    """What is printed."""
    names = list(made.figures)
    rows = by_groups(names, 0, made.row) | {"all": made.row(names)}
    shown = ["", *table("kind", rows), ""]
    shown += table("layer", by_groups(names, 1, made.row))
    for name, norms in made.whole.items():
        ratio = f", {norms['update'] / norms['base']:.2%} of W0" if norms["base"] else ""
        shown.append(f"{name}: trained whole, moved by {norms['update']:.4g}{ratio}")
    if made.kept is not None:
        pruned = [path for path, rank in made.kept.ranks.items() if not rank]
        without = f"; none of {and_more(pruned)}" if pruned else ""
        shown.append(f"AdaLoRA kept {made.kept.kept:,} of {made.kept.of:,} triplets{without}")
        means = ", ".join(f"{kind} {r:.3g}" for kind, r in made.kept.means(0).items())
        shown.append(f"mean rank: {means}")
    if made.against is not None:
        both = list(made.beside)
        kinds = by_groups(both, 0, made.beside_row) | {"all": made.beside_row(both)}
        kinds = {kind: kinds[kind] for kind in rows if kind in kinds}  # some lack the first layers
        shown += ["", f"beside {made.against}:", *beside_table("kind", kinds)]
        for what, alone in (
            ("adapter", [name for name in names if name not in made.beside]),
            ("against", made.alone),
        ):
            if alone:
                shown.append(f"only in --{what}: {len(alone)} matrices: {and_more(alone)}")
    return shown


def write(made: Analysis, folder: Path) -> None:
    """Write the files of the result."""
    text = json.dumps(made.record(), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    write_atomically(folder / RESULT, text.encode())
    grids = {
        f"{name}.{side}": getattr(beside, side).float()
        for name, beside in made.beside.items()
        for side in ("input", "output")
        if getattr(beside, side) is not None
    }
    if made.against is not None:
        tensors = [
            new_float_tensor(key, torch.float32, grid.shape, partial(iter, (grid,)))
            for key, grid in grids.items()
        ]
        write_tensors(folder / GRIDS, tensors, lambda _: None)
    kinds = by_groups(list(made.figures), 0, made.row)
    draw(folder, made.figures, kinds, made.row, made.beside, made.kept)


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        "dlora.analyse",
        "Say what an adapter learned: norms, ranks and directions of its updates beside W0, by "
        "layer and kind, and how similar they are to another adapter's.",
    )
    add = parser.add_argument
    what = "an adapter's directory or a checkpoint, or a name in --library"
    add("--adapter", required=True, metavar="DIR", help=f"{what} (required)")
    add("--against", metavar="DIR", help="another adapter of the same base (default: none)")
    add("--to", required=True, metavar="DIR", help="directory to write; new or empty (required)")
    add("--base", metavar="PATH", help="the base (default: the one that the adapter records)")
    add("--library", metavar="DIR", help="library whose names may be used (default: none)")
    add(
        "--trust-remote-code",
        action="store_true",
        help="run the Python code that comes with the base (default: no)",
    )
    return parser


if __name__ == "__main__":
    exit_with(main)
