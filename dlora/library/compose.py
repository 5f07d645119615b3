"""`dlora compose`: one adapter from several, `Σ wᵢ·ΔWᵢ` or what TIES and DARE make of them.

The adapters' files are enough: no base is read, and one matrix at a time is in memory. With
`--search` the weights are found by how well the mix does on a few examples, for which the base is
loaded once.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Sequence
from pathlib import Path

from dlora.cli import new_target
from dlora.data import FORMATS
from dlora.errors import UsageError
from dlora.io.files import path_of
from dlora.library.composition import DENSITY, Composition, check_weights
from dlora.library.mixtures import METHODS, ON_FACTORS, RANDOM, TRUNCATING, WITH_DENSITY
from dlora.library.options import as_number, share, whole
from dlora.library.place import place_of
from dlora.library.result import write_result
from dlora.library.same_base import Base, apart_line, base_line, base_of, common_base
from dlora.library.search import search
from dlora.library.store import Library
from dlora.library.stored import StoredAdapter, read_adapter
from dlora.runtime.arguments import OneLineParser
from dlora.runtime.exit_status import exit_with

BUDGET, SEED = 40, 0


def main(argv: list[str]) -> int:
    """The command; returns the exit status."""
    args = _parser().parse_args(argv)
    _check_options(args)
    named = [_entry(word, args.search is not None) for word in args.adapters]
    library = Library(path_of(args.library, "--library")) if args.library else None
    found = [place_of(name, library, "--adapters") for name, _ in named]
    adapters = [read_adapter(place) for place, _ in found]
    _check_different([name for name, _ in named], adapters)
    target = new_target(args.to, *(adapter.directory for adapter in adapters))
    base = _base(args.base, adapters, [base for _, base in found])
    weights = [weight for _, weight in named]
    how = {"rank": args.rank, "density": args.density or DENSITY, "seed": args.seed or SEED}
    try:
        values = _weights(args, adapters, weights, base, target)
        composition = Composition(adapters, values, args.method, **how)
        check_weights([(name, w) for (name, _), w in zip(named, values, strict=True)])
        _announce(composition)
        write_result(composition, target, base, print)
    except OSError as error:
        at = Path(error.filename or target)
        is_read = any(at.is_relative_to(adapter.directory) for adapter in adapters)
        what = f"--adapters: cannot read {at}" if is_read else f"--to: cannot write {args.to}"
        raise UsageError(f"{what}: {error.strerror or error}") from error
    for line in energy_lines(composition):
        print(line)
    print(f"wrote {args.to}")
    return 0


def energy_lines(composition: Composition) -> list[str]:
    """The share of Σ σ² that truncation lost, for each weight and in all."""
    if composition.method not in TRUNCATING:
        return []
    lost, energy = (sum(values) for values in zip(*composition.energies.values(), strict=True))
    lines = [f"  {path:<60} {share:.3%}" for path, share in composition.lost().items()]
    return ["energy lost:", *lines, f"  {'all':<60} {lost / energy if energy else 0:.3%}"]


def _check_options(args: argparse.Namespace) -> None:
    for option, methods in (("rank", TRUNCATING), ("density", WITH_DENSITY), ("seed", RANDOM)):
        if getattr(args, option) is None or args.method in methods:
            continue
        if option == "seed" and args.search is not None:
            continue
        raise UsageError(f"--{option} cannot act with --method {args.method}")
    for option in ("budget", "format", "max_length"):
        if args.search is None and getattr(args, option) is not None:
            raise UsageError(f"--{option.replace('_', '-')} cannot act without --search")


def _entry(word: str, is_searched: bool) -> tuple[str, float | None]:
    """`DIR=W`, or `DIR` where weights are searched for."""
    name, separator, text = word.rpartition("=")
    if not separator or os.path.isdir(os.path.expanduser(word)):
        if not is_searched:
            raise UsageError(
                f"--adapters: {word} has no weight: write {word}=1.0, or let --search find it"
            )
        return word, None
    weight = as_number(text)
    if not name or not math.isfinite(weight):
        raise UsageError(f"--adapters: {word}: a weight is a finite number, not {text!r}")
    return name, weight


def _check_different(names: Sequence[str], adapters: Sequence[StoredAdapter]) -> None:
    seen: dict[Path, str] = {}
    for name, adapter in zip(names, adapters, strict=True):
        place = adapter.directory.resolve()
        if place in seen:
            raise UsageError(
                f"--adapters: {seen[place]} and {name} are one adapter; give it once, with the sum "
                "of the weights"
            )
        seen[place] = name


def _base(
    override: str | None, adapters: Sequence[StoredAdapter], known: Sequence[Base | None]
) -> Base:
    """The one base of the adapters; prints how it is known."""
    bases = {
        str(adapter.directory): base or base_of(adapter.directory, adapter.settings)
        for adapter, base in zip(adapters, known, strict=True)
    }
    if override is not None:
        bases = {name: Base(override, None, base.identity) for name, base in bases.items()}
    base = common_base(bases)
    print(base_line(base, bases.values()))
    if line := apart_line({str(a.directory): a.shapes for a in adapters}):
        print(line)
    return base


def _weights(
    args: argparse.Namespace,
    adapters: Sequence[StoredAdapter],
    weights: Sequence[float | None],
    base: Base,
    target: Path,
) -> list[float]:
    """The weights as given, and those that are not as found."""
    given = [weight for weight in weights if weight is not None]
    if args.search is None:
        return given
    if len(given) == len(weights):
        raise UsageError("--search: every adapter has a weight; leave out those to be found")
    return search(
        adapters,
        weights,
        base,
        args.search,
        budget=args.budget or BUDGET,
        seed=args.seed or SEED,
        format=args.format or "chat",
        max_length=args.max_length or 512,
        beside=target,
    )


def _announce(composition: Composition) -> None:
    pairs = zip(composition.adapters, composition.weights, strict=True)
    for adapter, weight in pairs:
        print(f"  {weight:+g}  {adapter.directory}: {len(adapter.places)} weights")
    ranks = sorted({composition.rank_of(path) for path in composition.places})
    shown = f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
    print(f"{composition.method}: {len(composition.places)} weights, r {shown}")
    if composition.method in ON_FACTORS:
        print(
            f"{composition.method} works on A and B, as PEFT's: another factorisation of the same "
            "updates gives another result; cat, svd, ties_svd and dare_svd work on the updates"
        )


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        "dlora.compose",
        "Make one adapter from several of the same base. The files of the adapters are enough; the "
        "result is a plain LoRA that dlora and PEFT load.",
    )
    add = parser.add_argument
    add(
        "--adapters",
        required=True,
        nargs="+",
        action="extend",
        metavar="DIR=W",
        help="adapter directories, or names in --library, each with its weight, such as out/a=0.7 "
        "out/b=-0.3; with --search a weight may be left out (required)",
    )
    add(
        "--method",
        required=True,
        choices=METHODS,
        help="cat: the exact sum, of all ranks together; svd: its best approximation of rank R; "
        "ties_svd, dare_svd: TIES or DARE of the updates, then rank R; linear, ties, dare: PEFT's, "
        "on A and B (required)",
    )
    add("--to", required=True, metavar="DIR", help="directory to write; new or empty (required)")
    add(
        "--rank",
        type=whole(),
        metavar="R",
        help="r of svd, ties_svd and dare_svd (default: the largest of the adapters)",
    )
    add(
        "--density",
        type=share,
        metavar="D",
        help=f"share of elements that TIES and DARE keep (default: {DENSITY})",
    )
    add(
        "--seed",
        type=whole(0),
        metavar="S",
        help=f"of DARE's masks and of the search (default: {SEED})",
    )
    add("--library", metavar="DIR", help="library whose names --adapters may use (default: none)")
    add(
        "--base",
        metavar="PATH",
        help="the base of all adapters, where they name it differently (default: what they record)",
    )
    add(
        "--search",
        metavar="FILE",
        help="find weights by the loss on these examples, without gradients (default: no)",
    )
    add(
        "--budget",
        type=whole(),
        metavar="N",
        help=f"mixes that --search tries (default: {BUDGET})",
    )
    add(
        "--format",
        choices=sorted({*FORMATS} - {"labelled"}),  # of classifications
        help="layout of the records of --search (default: chat)",
    )
    add(
        "--max-length",
        type=whole(2),
        metavar="N",
        help="tokens to which the examples of --search are cut (default: 512)",
    )
    return parser


if __name__ == "__main__":
    exit_with(main)
