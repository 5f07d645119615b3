"""Linear layers whose weight is a product of two thin matrices, as `dlora compress` writes them.

    module.weight [m, n]      ──>   module.weight_B [m, k],  module.weight_A [k, n]
    y = x Wᵀ + b              ──>   y = (x Aᵀ) Bᵀ + b

Of a layer that stores [in, out], as Conv1D, A and B are those of its transpose. Both are plain
frozen parameters, so engines shard and gather them like any other. The layer stays the same object:
its class becomes a subclass.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dlora.quant.made_class import made_class

FACTORS = ("weight_B", "weight_A")


@dataclass(frozen=True)
class FactoredWeight:
    """B·A in the place of a weight [m, n]."""

    B: Tensor
    A: Tensor

    @property
    def dtype(self) -> torch.dtype:
        return self.B.dtype

    def t(self) -> FactoredWeight:
        """Its transpose."""
        return FactoredWeight(self.A.t(), self.B.t())

    def to(self, dtype: torch.dtype) -> FactoredWeight:
        """The factors in another dtype."""
        return FactoredWeight(self.B.to(dtype), self.A.to(dtype))

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x Wᵀ + b, in two thin products."""
        return F.linear(F.linear(x, self.A), self.B, bias)

    def times(self, dy: Tensor) -> Tensor:
        """dy W."""
        return (dy @ self.B) @ self.A

    def whole(self) -> Tensor:
        """The weight; do not store it."""
        return self.B @ self.A


class FactoredMixin:
    """A linear layer whose weight is a product, or was one before."""

    transposed: bool  # the weight is stored [in, out], as that of a Conv1D

    def forward(self: Any, x: Tensor) -> Tensor:
        if not is_factored(self):
            return super().forward(x)  # type: ignore[misc]
        return FactoredWeight(self.weight_B, self.weight_A).product(x, self.bias)


def is_factored(module: nn.Module) -> bool:
    """Whether the weight is a product now."""
    return isinstance(module, FactoredMixin) and FACTORS[0] in module._parameters


def factored_weight(module: Any) -> FactoredWeight:
    """The weight of a factored layer, as it is stored."""
    weight = FactoredWeight(module.weight_B, module.weight_A)
    return weight.t() if module.transposed else weight


def factor(module: nn.Module, k: int, *, transposed: bool = False) -> None:
    """Replace the weight of a linear layer by factors without values, in place.

    Args:
        k: columns of B and rows of A.
        transposed: the weight is stored [in, out], as that of a Conv1D.
    """
    weight = module.get_parameter("weight")
    m, n = reversed(weight.shape) if transposed else weight.shape
    rest = {name: p for name, p in module._parameters.items() if name != "weight"}
    module._parameters.clear()
    for name, shape in zip(FACTORS, ((m, k), (k, n)), strict=True):
        values = torch.empty(shape, dtype=weight.dtype, device=weight.device)
        module.register_parameter(name, nn.Parameter(values, requires_grad=False))
    module._parameters.update(rest)
    base: Any = type(module)
    module.__class__ = factored_class(base, transposed)


@functools.cache
def factored_class(base: Any, transposed: bool) -> type:
    """The subclass of `base` whose weight is a product. Cached: equal layers share one class."""
    name, given = f"Factored{base.__name__}", (base, transposed)
    return made_class(FactoredMixin, base, name, factored_class, *given, transposed=transposed)
