"""`dlora report RUN [RUN ...] --to FILE.html`: one page on one run, or on several side by side."""

from __future__ import annotations

import argparse
from pathlib import Path

from dlora.errors import UsageError
from dlora.io.files import path_of, write_atomically
from dlora.report.page import page_of
from dlora.report.run_files import find_runs
from dlora.runtime.arguments import OneLineParser
from dlora.runtime.exit_status import exit_with


def main(argv: list[str]) -> int:
    """The command; returns the exit status."""
    args = _parser().parse_args(argv)
    target = _target(args.to)
    content = page_of(find_runs(args.runs))
    try:
        write_atomically(target, content)
    except OSError as error:
        raise UsageError(f"--to: cannot write {args.to}: {error.strerror or error}") from error
    print(f"wrote {args.to} ({len(content) / 1e6:.1f} MB)")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser("dlora report", "write one page on what runs did")
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="output.dir of a run; of several adapters, all"
    )
    parser.add_argument("--to", required=True, metavar="FILE.html", help="the page")
    return parser


def _target(word: str) -> Path:
    """The path of `--to`: a file named .html, which may be there already, in a directory that is.

    A file of another name would be something else that the page replaces.
    """
    target = path_of(word, "--to")
    if target.suffix.lower() not in (".html", ".htm"):
        raise UsageError(f"--to: {word}: name a file that ends in .html")
    if target.is_dir():
        raise UsageError(f"--to: {word} is a directory; name a file that ends in .html")
    if not target.parent.is_dir():
        raise UsageError(f"--to: {word}: there is no directory {target.parent}")
    return target


if __name__ == "__main__":
    exit_with(main)
