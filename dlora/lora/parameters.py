"""Adapters of single parameters, above all of the stacked weights of experts: `target_parameters`.

    W0 [E, m, n] (or [E, n, m])     ΔW_e = s·B_e·A_e        e = expert, E = 1 for a matrix [m, n]
    A [E·r, n]   rows e·r … (e+1)·r are A_e
    B [m, r·E]   column j·E + e is column j of B_e

This is PEFT's form (`lora.ParamWrapper`), down to the order of the elements. The module that has
the parameter computes with a `LowRankWeight` in its place, so neither ΔW nor W0 + ΔW is formed
where it multiplies expert by expert or by a grouped product.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dlora.errors import UsageError
from dlora.lora.init import Initialisation
from dlora.lora.layers import AdaptedLayer, acting
from dlora.lora.low_rank_weight import LowRankWeight
from dlora.lora.variants.lora import LoraAdapter, PlainLora


class StackedLora(PlainLora):
    """The plain form of E adapters in one; r is that of each."""

    experts = 1

    @property
    def r(self) -> int:
        return self.A.shape[0] // self.experts


class ParameterAdapter(LoraAdapter):
    """A and B of one parameter.

    Args:
        experts: E, the matrices that the parameter has; None: it is a matrix.
        transposed: it is stored [E, n, m], input features before output features.
    """

    def __init__(self, *, experts: int | None, transposed: bool, r: int, **others: Any) -> None:
        super().__init__(r=r * (experts or 1), **others)
        self.experts, self.transposed = experts, transposed

    @property
    def r(self) -> int:
        return self.lora_A.shape[0] // (self.experts or 1)

    def weight(self, weight: Tensor) -> LowRankWeight:
        """W0 + ΔW, as products see it."""
        A, B = self.lora_A, self.lora_B
        if self.experts is None:
            return LowRankWeight(weight, B, A, self.scaling)
        A_Ern, B_Emr = self._stacked(A, B)
        if self.transposed:
            return LowRankWeight(weight, A_Ern.mT, B_Emr.mT, self.scaling)
        return LowRankWeight(weight, B_Emr, A_Ern, self.scaling)

    def as_lora(self) -> PlainLora:
        form = StackedLora(self.lora_A.detach(), self.lora_B.detach(), self.scaling)
        form.experts = self.experts or 1
        return form

    def delta(self, experts: slice = slice(None)) -> Tensor:
        """ΔW [m, n], or [E, m, n]; of some experts alone, if they are given."""
        if self.experts is None:
            return super().delta()
        A_Ern, B_Emr = self._stacked(self.lora_A.detach(), self.lora_B.detach())
        return (B_Emr[experts] @ A_Ern[experts]) * self.scaling

    def addend(self) -> Tensor:
        return self.delta()

    @torch.no_grad()
    def reset(self, *, is_embedding: bool, init: type[Initialisation]) -> None:
        """Draw A and B of every matrix."""
        pairs = [(self.lora_A.data, self.lora_B.data)]
        if self.experts is not None:
            pairs = list(zip(*self._stacked(*pairs[0]), strict=True))
        for A, B in pairs:
            init.draw(A, B, is_embedding=is_embedding)

    def _stacked(self, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """(A [E, r, n], B [E, m, r]), views."""
        assert self.experts is not None
        n, m = A.shape[1], B.shape[0]
        return A.view(self.experts, -1, n), B.view(m, -1, self.experts).permute(2, 0, 1)


class ParameterLayer(AdaptedLayer):
    """One adapted parameter in the place of a layer: what `named_adapters` yields for it.

    Args:
        module: has the parameter.
        name: of the parameter in the module.
    """

    def __init__(self, module: nn.Module, name: str) -> None:
        self.module, self.name = module, name
        self.weight_names = (name,)

    def sizes(self) -> tuple[int | None, int, int]:
        """(E or None, m, n); where the module's class says `is_transposed`, it stores [E, n, m]."""
        shape = tuple(shape_of(self.module.get_parameter(self.name)))
        if len(shape) == 2:
            return None, *shape
        experts, m, n = shape
        return (experts, n, m) if self.stored_transposed else (experts, m, n)

    @property
    def stored_transposed(self) -> bool:
        """PEFT's rule: an attribute of the module, of transformers' classes for experts."""
        is_stack = len(shape_of(self.module.get_parameter(self.name))) == 3
        return is_stack and bool(getattr(self.module, "is_transposed", False))

    def as_stored(self, module: Any, delta: Tensor) -> Tensor:  # type: ignore[override]
        return delta.mT if self.stored_transposed else delta

    def whole_weight(self) -> Tensor:
        return self.module.get_parameter(self.name).detach()

    def first_parameter(self) -> tuple[str, nn.Parameter]:
        return self.name, self.module.get_parameter(self.name)

    def replace(self, weight: Tensor) -> dict[str, nn.Parameter]:
        original = self.module.get_parameter(self.name)
        setattr(self.module, self.name, nn.Parameter(weight, requires_grad=False))
        return {self.name: original}

    def restore(self, originals: dict[str, nn.Parameter]) -> None:
        setattr(self.module, self.name, originals[self.name])


class ParameterAdapters(nn.Module):
    """The adapters of a module's own parameters, by their names; never called."""

    place: str

    @property
    def active(self) -> bool:
        """Whether the module computes with more than its parameters."""
        return any(adapter.active for adapter in self.children())

    def weights(self, module: nn.Module) -> dict[str, LowRankWeight]:
        """W0 + ΔW of each parameter that has an active adapter, by its name."""
        adapters: Any = self.named_children()
        return {n: a.weight(getattr(module, n)) for n, a in adapters if a.active}


class AdaptedParameters:
    """A module some of whose own parameters are adapted."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        with _substituted(self):
            return super().forward(*args, **kwargs)  # type: ignore[misc]


@contextmanager
def _substituted(module: Any) -> Iterator[None]:
    """Inside, the module's adapted parameters are `LowRankWeight`s.

    As attributes of the object, which are found before its parameters: these stay registered.
    """
    adapters = acting(module)
    active = {} if adapters is None else adapters.weights(module)
    module.__dict__.update(active)
    try:
        yield
    finally:
        for name in active:
            del module.__dict__[name]


def shape_of(parameter: Any) -> Any:
    """The whole shape: of a partitioned parameter DeepSpeed knows it, and the tensor does not."""
    return getattr(parameter, "ds_shape", parameter.shape)


def check_parameter(path: str, parameter: nn.Parameter) -> None:
    """Raise a `UsageError` unless a parameter is one that can be adapted."""
    dims = len(shape_of(parameter))
    if dims not in (2, 3):
        raise UsageError(
            f"target_parameters: {path} has {dims} dim(s); matrices and stacks of matrices can be "
            "adapted"
        )
    if not parameter.is_floating_point():
        raise UsageError(f"target_parameters: {path} is packed, so it has no weight to be adapted")
