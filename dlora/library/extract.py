"""`dlora extract`: a plain LoRA of what a full fine-tune changed.

    D = W_tuned − W_base ≈ B·A, by the spectrum of each matrix     r = lora_alpha, so s = 1

What has no matrix is stored whole or named; see `units.py`. Memory: one D with its decomposition,
and at the end the adapter.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dlora.adapters.write import converted_line
from dlora.cli import new_target
from dlora.errors import UsageError, and_more
from dlora.io.files import new_directory, path_of
from dlora.library.changes import Change, Pair, Stored
from dlora.library.dealt import Parts, agreed, naming_target, on_all_ranks, parts_beside, work_on
from dlora.library.extracted import Extracted
from dlora.library.low_rank import Cut, Decomposed, LowRank
from dlora.library.units import Kind, Unit, units_of
from dlora.lora.layers import layer_kind
from dlora.lora.parameters import ParameterLayer
from dlora.runtime.arguments import OneLineParser
from dlora.runtime.exit_status import exit_with
from dlora.runtime.ranks import Ranks


def main(argv: list[str], ranks: Ranks | None = None) -> int:
    """The command; returns the exit status.

    Args:
        ranks: None: those that torchrun started.
    """
    return on_all_ranks(lambda: _parsed(argv), _extract, ranks)


def _parsed(argv: list[str]) -> argparse.Namespace:
    parser = OneLineParser(
        "dlora extract", "Write what a full fine-tune changed of its base as a plain LoRA."
    )
    path = "hub id, directory or .gguf file"
    parser.add_argument("--base", required=True, metavar="PATH", help=f"{path} (required)")
    parser.add_argument(
        "--tuned", required=True, metavar="PATH", help=f"the model tuned from it: {path} (required)"
    )
    add_cut(parser, rank=True)
    parser.add_argument(
        "--to", required=True, metavar="DIR", help="directory to write; new or empty (required)"
    )
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run the Python code that comes with the models (default: no)",
    )
    args = parser.parse_args(argv)
    sources = [path_of(args.base, "--base"), path_of(args.tuned, "--tuned")]
    sources = [path for path in sources if path.is_dir()]
    args.target = new_target(args.to, *sources, what="a model that is read")
    return args


def add_cut(parser: argparse.ArgumentParser, *, rank: bool) -> None:
    """Add the options that say where a spectrum is cut; one is required."""
    group: Any = parser.add_mutually_exclusive_group(required=True) if rank else parser
    if rank:
        group.add_argument(
            "--rank", type=_rank, metavar="R", help="rank of every matrix, where it has as much"
        )
    group.add_argument(
        "--energy",
        type=_share,
        required=not rank,
        metavar="E",
        help="share of the squares of the singular values that each matrix keeps, in (0, 1]"
        + ("" if rank else " (required)"),
    )


def _rank(word: str) -> int:
    if not (word.isascii() and word.isdecimal() and 1 <= int(word) <= 65536):
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 to 65536, not {word!r}")
    return int(word)


def _share(word: str) -> float:
    try:
        value = float(word)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"must be a number above 0 and at most 1, not {word!r}")
    return value


@torch.no_grad()
def _extract(ranks: Ranks, args: argparse.Namespace) -> None:
    def open_both() -> Pair:
        code = args.trust_remote_code
        models = [
            Stored.open(path, option, trust_remote_code=code)
            for path, option in ((args.base, "--base"), (args.tuned, "--tuned"))
        ]
        return Pair(*models)

    pair = agreed(ranks, "models", open_both)
    units = units_of(pair.base.skeleton, pair.base.shapes)
    cut = Cut(args.rank, args.energy)
    say: Callable[[str], None] = print if ranks.main else lambda _: None
    for line in pair.remarks():
        say(line)
    with parts_beside(args.target, ranks) as parts:
        costs = [unit.cost for unit in units]
        work_on(ranks, costs, args.target, lambda i: _take(pair, units[i], cut, parts, i))

        def result() -> None:
            if ranks.main:
                _write(pair, units, parts, args, say)

        agreed(ranks, "result", result)


def _take(pair: Pair, unit: Unit, cut: Cut, parts: Parts, number: int) -> None:
    """Write what is extracted of one unit; of what did not change, that."""
    record: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {}
    if unit.kind is Kind.MATRIX:
        D, change = pair.difference(unit.names[0])
        if change:
            kind: Any = layer_kind(pair.base.skeleton.get_submodule(unit.path))
            low = _low_rank(kind.as_product(D), cut, unit.path)
            tensors = {"lora_A": low.A, "lora_B": low.B}
            record = {"energy": low.energy, **change.record()}
    elif unit.kind is Kind.STACK:
        record, tensors = _stack(pair, unit, cut)
    elif change := pair.change(unit.names):
        record = change.record()
        if unit.kind is Kind.WHOLE:
            prefix = f"{unit.path}."
            tensors = {name.removeprefix(prefix): pair.value(name) for name in unit.names}
    parts.write(number, record, tensors)


def _low_rank(D: Tensor, cut: Cut, what: str) -> LowRank:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    decomposed = Decomposed.of(D.to(device), f"--tuned: the change of {what}")
    return decomposed.cut(cut.of(decomposed.squares))


def _stack(pair: Pair, unit: Unit, cut: Cut) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A and B of all experts, which have one rank: the highest that any of them needs."""
    owner, _, name = unit.path.rpartition(".")
    layer = ParameterLayer(pair.base.skeleton.get_submodule(owner), name)
    experts, m, n = layer.sizes()
    assert experts is not None
    found: dict[int, LowRank] = {}
    kept, change = 0.0, Change()
    for expert in range(experts):
        D, own = pair.difference(unit.path, expert)
        change += own
        if own:
            found[expert] = _low_rank(layer.as_stored(layer, D), cut, f"{unit.path}[{expert}]")
            kept += found[expert].energy * own.squares
    if not found:
        return {}, {}
    r = max(low.A.shape[0] for low in found.values())
    A, B = torch.zeros(experts, r, n), torch.zeros(m, r, experts)
    for expert, low in found.items():
        A[expert, : len(low.A)], B[:, : len(low.A), expert] = low.A, low.B
    record = {"energy": kept / change.squares, **change.record()}
    return record, {"lora_A": A.view(experts * r, n), "lora_B": B.view(m, r * experts)}


def _write(
    pair: Pair, units: list[Unit], parts: Parts, args: argparse.Namespace, say: Callable
) -> None:
    extracted = Extracted.gather(pair, units, parts)
    if not extracted.adapted and not extracted.whole:
        if extracted.named:
            what = f"{and_more(list(extracted.named), 1)} alone changed"
            raise UsageError(f"--tuned: {what}, which an adapter has no place for")
        what = f"{args.tuned} has the weights of {args.base}"
        raise UsageError(f"--tuned: {what}, so there is nothing to extract")
    for line in extracted.lines():
        say(line)
    with naming_target(args.target), new_directory(args.target) as folder:
        extracted.write(folder)
    if note := converted_line(pair.base.base.path, pair.base.base.source):
        say(note)
    say(f"wrote {args.to}")


if __name__ == "__main__":
    exit_with(main)
