"""`dlora compress`: a model whose weights are products of two thin matrices, where that pays.

    W [m, n] ≈ B·A of rank k      k·(m + n) weights instead of m·n, so it pays for k < mn/(m + n)

Spectra of pretrained weights are flat, so it often does not: such a layer stays as it is, and is
named with its figures. Memory: one W with its decomposition, and then a few blocks.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from dlora.base.quantize import replaceable
from dlora.base.stored_base import StoredBase
from dlora.cli import naming_base, new_target
from dlora.errors import UsageError
from dlora.io.files import path_of
from dlora.library.changes import Stored
from dlora.library.compressed import Compressed, Layer
from dlora.library.dealt import Parts, agreed, naming_target, on_all_ranks, parts_beside, work_on
from dlora.library.extract import add_cut
from dlora.library.low_rank import Cut, Decomposed
from dlora.library.units import cost_of
from dlora.lora.layers import layer_kind
from dlora.runtime.arguments import OneLineParser
from dlora.runtime.exit_status import exit_with
from dlora.runtime.ranks import Ranks


def main(argv: list[str], ranks: Ranks | None = None) -> int:
    """The command; returns the exit status.

    Args:
        ranks: None: those that torchrun started.
    """
    return on_all_ranks(lambda: _parsed(argv), _compress, ranks)


def _parsed(argv: list[str]) -> argparse.Namespace:
    parser = OneLineParser(
        "dlora compress",
        "Write a model whose linear layers are products of two thin matrices, where that pays.",
    )
    parser.add_argument(
        "--base", required=True, metavar="PATH", help="hub id, directory or .gguf file (required)"
    )
    add_cut(parser, rank=False)
    parser.add_argument(
        "--to", required=True, metavar="DIR", help="directory to write; new or empty (required)"
    )
    parser.add_argument(
        "--dense",
        action="store_true",
        help="write the products as whole weights, which transformers loads and which save nothing "
        "(default: no)",
    )
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run the Python code that comes with the base (default: no)",
    )
    args = parser.parse_args(argv)
    source = path_of(args.base, "--base")
    args.target = new_target(
        args.to, *([source] if source.is_dir() else []), what="the model itself"
    )
    return args


@dataclass(frozen=True)
class _Base:
    model: Stored
    stored: StoredBase
    layers: list[Layer]
    left: dict[str, str]  # why, of layers that are not looked at


def _opened(args: argparse.Namespace) -> _Base:
    """The base, and which of its layers may become products."""
    model = Stored.open(args.base, "--base", trust_remote_code=args.trust_remote_code)
    with naming_base("--base"):
        stored = StoredBase(model.base, model.skeleton)
    layers, left = [], dict[str, str]()
    for path, why in replaceable(model.skeleton).items():
        weight = f"{path}.weight"
        if not why and not (stored.has(weight) and stored.key_of(weight).endswith("weight")):
            why = "transformers assembles its weight while loading"
        if why:
            left[path] = why
            continue
        module: Any = model.skeleton.get_submodule(path)
        kind: Any = layer_kind(module)
        m, n = kind.shape(module)
        layers.append(Layer(path, stored.key_of(weight), m, n, kind.transposed))
    if not layers:
        why = next((f": {path}: {why}" for path, why in left.items()), "")
        raise UsageError(f"--base: {args.base} has no linear layer that can become a product{why}")
    return _Base(model, stored, layers, left)


@torch.no_grad()
def _compress(ranks: Ranks, args: argparse.Namespace) -> None:
    base = agreed(ranks, "base", lambda: _opened(args))
    say: Callable[[str], None] = print if ranks.main else lambda _: None
    cut = Cut(energy=args.energy)
    with parts_beside(args.target, ranks) as parts:
        costs = [cost_of(layer.m, layer.n) for layer in base.layers]
        work_on(ranks, costs, args.target, lambda i: _take(base, base.layers[i], cut, parts, i))

        def result() -> None:
            if ranks.main:
                _write(base, parts, args, say)

        agreed(ranks, "result", result)


def _take(base: _Base, layer: Layer, cut: Cut, parts: Parts, number: int) -> None:
    """Write the factors of one layer, or where they do not pay, that."""
    name = f"{layer.path}.weight"
    W = torch.empty(base.model.shapes[name])
    base.model.weights.read(name, 0, W.view(-1))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    W = (W.t() if layer.transposed else W).to(device)
    decomposed = Decomposed.of(W, f"--base: {name}")
    k = cut.of(decomposed.squares)
    if not layer.pays(k):
        parts.write(number, {"rank": k}, {})
        return
    low = decomposed.cut(k)
    parts.write(number, {"rank": k, "energy": low.energy}, {"A": low.A, "B": low.B})


def _write(base: _Base, parts: Parts, args: argparse.Namespace, say: Callable) -> None:
    records = {layer.path: parts.record(i) for i, layer in enumerate(base.layers)}
    made = Compressed(base.stored, base.layers, records, base.left, parts, args.dense)
    for line in made.lines():
        say(line)
    if not made.products:
        raise UsageError(
            f"--energy: {args.energy:g} pays for none of {len(base.layers)} linear layers of "
            f"{args.base}: each of them would take as many weights as it has, or more"
        )
    made.check_space(args.target)
    with naming_target(args.target):
        made.write(args.target, say)
    say(f"wrote {args.to}")


if __name__ == "__main__":
    exit_with(main)
