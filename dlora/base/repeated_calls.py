"""Modules that a class calls as often as its sequence is long, found in its source.

    for query in range(seq_length):  …  self.k_layernorm(pooled)

Ranks with sequences of other lengths make other calls. DeepSpeed, which gathers a weight when its
module is called, needs the same calls on all ranks.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Iterator
from typing import Any

from torch import nn


def calls_by_length(model: nn.Module) -> dict[str, str]:
    """{path of a module with parameters: the class that calls it once for each position}."""
    found: dict[str, str] = {}
    for path, module in model.named_modules():
        kind: Any = type(module)
        for name in _called_in_loops(kind):
            child = getattr(module, name, None)
            if isinstance(child, nn.Module) and any(True for _ in child.parameters()):
                found[f"{path}.{name}" if path else name] = kind.__name__
    return found


@functools.cache
def _called_in_loops(kind: type) -> frozenset[str]:
    """Names x of `self.x(…)` inside loops of the forward over a range of a tensor's shape."""
    forward = inspect.unwrap(kind.forward) if hasattr(kind, "forward") else None
    if not inspect.isfunction(forward) or "range" not in forward.__code__.co_names:
        return frozenset()
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(forward)))
    except (OSError, SyntaxError):  # no source, or one that is no whole function
        return frozenset()
    sizes = set(_sizes(tree))
    return frozenset(
        call.func.attr
        for loop in ast.walk(tree)
        if isinstance(loop, ast.For) and _is_range_of(loop.iter, sizes)
        for call in ast.walk(loop)
        if isinstance(call, ast.Call)
        and isinstance(call.func, ast.Attribute)
        and ast.unparse(call.func.value) == "self"
    )


def _sizes(tree: ast.AST) -> Iterator[str]:
    """The local names that are sizes of tensors: `batch, length, _ = x.shape`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and _is_size(node.value):
            for name in ast.walk(node.targets[0]):
                if isinstance(name, ast.Name):
                    yield name.id


def _is_size(node: ast.AST) -> bool:
    """Whether a size of a tensor, but for one of images (`pixel_values`), is in an expression."""
    names = [n.id for n in ast.walk(node) if isinstance(n, ast.Name)]
    asks = any(isinstance(n, ast.Attribute) and n.attr in ("shape", "size") for n in ast.walk(node))
    return asks and not any(name.startswith("pixel") for name in names)


def _is_range_of(node: ast.expr, sizes: set[str]) -> bool:
    is_range = isinstance(node, ast.Call) and ast.unparse(node.func) == "range"
    names = {name.id for name in ast.walk(node) if isinstance(name, ast.Name)}
    return is_range and bool(_is_size(node) or names & sizes)
