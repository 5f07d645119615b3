"""`python -m models.table`: docs/models.md, made by running every architecture.

    two workers     make the base, then its figures under fsdp2 and zero3      a class ahead
    one worker      all other columns

Workers are started once. A class that fails, crashes or takes too long fills its own row with that,
and the table goes on with new workers.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ranks import Pool, RankFailure

from .architectures import Architecture, ClassFails, architectures, first_line
from .columns import COLUMNS, cells
from .page import Row, page, rows_of
from .runs import two_ranks

PAGE = Path(__file__).parents[2] / "docs/models.md"
LIMIT_SECONDS = 180.0  # for each of a class's calls; most take one
ENGINES = ("fsdp2", "zero3")


def make(architecture: Architecture, base: Path) -> str:
    """On a worker: write a base; returns why the class cannot, or an empty text."""
    try:
        architecture.make(base)
    except ClassFails as error:
        return str(error)
    return ""


class Workers:
    """The processes that all architectures go through.

    Args:
        directory: of logs and bases.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._pools = {name: Pool(n, directory / name) for name, n in (("make", 1), ("one", 1))}
        self._pools["two"] = Pool(2, directory / "two")

    def rows(self, wanted: Sequence[Architecture]) -> Iterator[tuple[Architecture, Row]]:
        """The rows of architectures, in order, as they are done."""
        with ThreadPoolExecutor(1) as ahead:
            bases = [self._directory / f"{i}-{a.model_type}" for i, a in enumerate(wanted)]
            figures = [ahead.submit(self._begin, *pair) for pair in zip(wanted, bases, strict=True)]
            try:
                for architecture, base, two in zip(wanted, bases, figures, strict=True):
                    yield architecture, self._end(architecture, base, two)
                    shutil.rmtree(base, ignore_errors=True)
            finally:
                ahead.shutdown(cancel_futures=True)

    def close(self) -> None:
        """End the processes."""
        for pool in self._pools.values():
            pool.close()

    def _begin(self, architecture: Architecture, base: Path) -> tuple[str, dict[str, Any]]:
        """(why the class itself fails, figures on two ranks by engine)."""
        broken = self._call("make", make, architecture, base)
        if broken:
            return broken[1] if isinstance(broken, tuple) else broken, {}
        return "", {engine: self._call("two", two_ranks, base, engine) for engine in ENGINES}

    def _end(self, architecture: Architecture, base: Path, two: Future[Any]) -> Row:
        broken, figures = two.result()
        if broken:
            return dict.fromkeys(COLUMNS, ("class", _without(base, broken)))
        row = self._call("one", cells, architecture, base, figures)
        if isinstance(row, tuple):
            row = dict.fromkeys(COLUMNS, row)
        return {name: (mark, _without(base, why)) for name, (mark, why) in row.items()}

    def _call(self, pool: str, function: Any, *args: Any) -> Any:
        """What rank 0 returns, or ("✗", why)."""
        try:
            return self._pools[pool].run(function, *args, limit=LIMIT_SECONDS)[0]
        except RankFailure as error:
            return "✗", _last_line(str(error))


def _without(base: Path, text: str) -> str:
    return text.replace(str(base), "BASE")


def _last_line(report: str) -> str:
    """The error that ended a call, from the report of all ranks."""
    ours = report.split("--- rank 0: ", 1)[-1].split("--- rank 1: ")[0]
    lines = [line for line in ours.splitlines() if line and not line.startswith((" ", "---"))]
    errors = [line for line in lines if "Error" in line.split(":")[0]]
    return first_line((errors or lines or ["no answer"])[-1])


def main(argv: Sequence[str]) -> int:
    """The command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="models.table", description="Write docs/models.md.")
    parser.add_argument(
        "--only", nargs="+", metavar="TYPE", help="these model types; the page's others stay"
    )
    args = parser.parse_args(argv)
    wanted = [a for a in architectures() if not args.only or a.model_type in args.only]
    rows: dict[Architecture, Row] = {}
    with tempfile.TemporaryDirectory() as directory:
        workers = Workers(Path(directory))
        try:
            since = time.monotonic()
            for architecture, row in workers.rows(wanted):
                rows[architecture] = row
                marks = " ".join(mark[0] for mark, _ in row.values())
                took = time.monotonic() - since
                print(f"{took:6.0f} s  {architecture.model_type:24} {marks}", flush=True)
                if args.only:
                    print(*(f"    {n}: {m} {why}" for n, (m, why) in row.items() if why), sep="\n")
                    _write(rows)
        finally:
            workers.close()
    if not args.only:
        PAGE.write_text(page(rows), encoding="utf-8")
    return 0


def _write(rows: dict[Architecture, Row]) -> None:
    """Put rows into the page in the place of those that it has of the same architectures."""
    before = rows_of(PAGE.read_text(encoding="utf-8"))
    all_rows = {a: rows.get(a) or before[a] for a in architectures() if a in rows or a in before}
    PAGE.write_text(page(all_rows), encoding="utf-8")


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
