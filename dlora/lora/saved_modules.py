"""Modules that are trained whole (`modules_to_save`): a copy in place of the frozen original."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dlora.lora.layers import acting
from dlora.lora.own_storage import OwnStorage
from dlora.lora.states import AdapterState, Stateful


class ModulesToSaveCopy(Stateful):
    """The trainable masters of one of `modules_to_save`: a tree of parameters like the base's.

    Like an adapter it is never called; its layer computes with the masters in place of its own
    parameters, cast to the base's dtype.
    """

    what = "trained copy"

    def __init__(self, weights: dict[str, Tensor], dtype: torch.dtype) -> None:
        super().__init__()
        self._dtypes = {path: weight.dtype for path, weight in weights.items()}
        for path, weight in weights.items():
            *owners, name = path.split(".")
            node: nn.Module = self
            for owner in owners:
                if not hasattr(node, owner):
                    node.add_module(owner, OwnStorage())
                node = node.get_submodule(owner)
            master = weight.detach().to(dtype, copy=True)
            node.register_parameter(name, nn.Parameter(master))

    @property
    def active(self) -> bool:
        """Whether the layer computes with the masters."""
        return self.state is AdapterState.ON

    def cast(self) -> dict[str, Tensor]:
        """The masters in the dtypes of the base's parameters, by path; gradients flow through."""
        return {path: p.to(self._dtypes[path]) for path, p in self.named_parameters()}


class ModulesToSaveLayer:
    """A module of `modules_to_save`: computes with its trained copy beside the frozen original."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        copy = acting(self)
        if copy is None:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        with _substituted(self, copy.cast()):
            return super().forward(*args, **kwargs)  # type: ignore[misc]


@contextmanager
def _substituted(module: nn.Module, tensors: dict[str, Tensor]) -> Iterator[None]:
    """Inside, `module` computes with `tensors` (by path) in place of its parameters."""
    slots = []
    for path, tensor in tensors.items():
        owner, _, name = path.rpartition(".")
        parameters: Any = module.get_submodule(owner)._parameters
        slots.append((parameters, name, parameters[name]))
        parameters[name] = tensor
    try:
        yield
    finally:
        for parameters, name, original in slots:
            parameters[name] = original
