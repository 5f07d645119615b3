"""Parameters that a library which goes through a model does not see."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def hidden(model: nn.Module, outside: set[nn.Parameter]) -> Iterator[None]:
    """Inside, `outside` are no parameters of the model, and what has none is no part of it.

    DeepSpeed gives every module hooks and expects the same calls on all ranks. A module without
    parameters has nothing to gather, and may be called as tokens are routed (an expert that is the
    identity).
    """
    modules = list(model.modules())
    taken = [
        (module, name, parameter)
        for module in modules
        for name, parameter in list(module.named_parameters(recurse=False))
        if parameter in outside
    ]
    empty = [
        (module._modules, name, child)
        for module in modules
        for name, child in list(module.named_children())
        if next(child.parameters(), None) is None
    ]
    tables = [(table, list(table.items())) for table in {id(t): t for t, _, _ in empty}.values()]
    for module, name, _ in taken:
        del module._parameters[name]
    for table, name, _ in empty:
        del table[name]
    try:
        yield
    finally:
        for module, name, parameter in taken:  # DeepSpeed has put other tables in
            module._parameters[name] = parameter
        for table, children in tables:  # in their order
            table.clear()
            table.update(children)
