"""The tensors of a model as an extraction takes them: low-rank, whole, or only by name.

MATRIX   the weight of a layer that can carry an adapter        A and B
STACK    the weights of experts, a matrix each                  A and B of each
WHOLE    a module without adapters, as a norm                   `modules_to_save`: its parameters
NAMED    what PEFT's files have no place for, as a bias         a line, and a file
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from torch import nn

from dlora.lora.layers import layer_kind
from dlora.lora.obstacles import statistics_in
from dlora.lora.weight_reads import weight_reads


class Kind(Enum):
    """How a tensor is taken."""

    MATRIX = "matrix"
    STACK = "stack"
    WHOLE = "whole"
    NAMED = "named"


@dataclass(frozen=True)
class Unit:
    """A piece of the work.

    Attributes:
        path: of the module; of a stack, of the parameter.
        names: of the tensors in the model.
        cost: in floating-point operations, roughly.
        why: of what is only named, the reason.
    """

    kind: Kind
    path: str
    names: tuple[str, ...]
    cost: float
    why: str = ""


def units_of(model: Any, shapes: Mapping[str, tuple[int, ...]]) -> list[Unit]:
    """All tensors of a model without adapters, in its order.

    Args:
        shapes: of the tensors that the files have, by name.
    """
    reads = weight_reads(model)
    found, seen = list[Unit](), set[str]()
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        own = [prefix + name for name, _ in module.named_parameters(recurse=False)]
        own = [name for name in own if name in shapes]
        seen |= set(own)
        read = reads.get(path)
        why = f"{read.reader} reads its weight itself" if read and read.bypasses else ""
        found += _of_module(path, module, own, why, shapes) if own else []
    buffers = [Unit(Kind.NAMED, n, (n,), 0.0, "it is a buffer") for n in shapes if n not in seen]
    return found + buffers


def _of_module(
    path: str, module: nn.Module, own: list[str], why: str, shapes: Mapping[str, tuple[int, ...]]
) -> Iterator[Unit]:
    weight = f"{path}.weight"
    if path and weight in own and not why and layer_kind(module) is not None:
        shape = shapes[weight]
        yield Unit(Kind.MATRIX, path, (weight,), cost_of(shape[0], math.prod(shape[1:])))
        rest = [name for name in own if name != weight]
        yield from _named(rest, "an adapter of its layer has no bias", shapes)
        return
    experts = getattr(module, "num_experts", None) if path else None
    stacks = [n for n in own if len(shapes[n]) == 3 and shapes[n][0] == experts]
    for name in stacks:
        experts, m, n = shapes[name]
        yield Unit(Kind.STACK, name, (name,), experts * cost_of(m, n))
    own = [name for name in own if name not in stacks]
    why = why or _not_whole(path, module, bool(stacks))
    if why:
        yield from _named(own, why, shapes)
    elif own:
        yield Unit(Kind.WHOLE, path, tuple(own), sum(math.prod(shapes[name]) for name in own))


def _not_whole(path: str, module: nn.Module, is_stack: bool) -> str:
    """Why a module cannot be one of `modules_to_save`; "" if it can."""
    if not path:
        return "it belongs to no module inside the model"
    if is_stack:
        return "its module has stacks of matrices, which are adapted"
    if any(True for child in module.children() for _ in child.parameters()):
        return "its module has layers inside, which are adapted"
    if statistics_in(module) is not None:
        return "its module has running statistics"
    return ""


def _named(names: list[str], why: str, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[Unit]:
    yield from (Unit(Kind.NAMED, n, (n,), float(math.prod(shapes[n])), why) for n in names)


def cost_of(m: int, n: int) -> float:
    """Of the products and the decomposition of a matrix."""
    return float(min(m, n)) ** 2 * (max(m, n) + 9.0 * min(m, n))
