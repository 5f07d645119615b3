"""Linear layers whose weight is packed.

    module.weight [k, n]      ──>   module.weight_codes   uint8 [k, code_bytes(n)]
                                    module.weight_scales  uint8 [k, scale_bytes(n)]

Both are plain frozen parameters, so engines shard and gather them like any other. The layer stays
the same object: its class becomes a subclass whose forward de-quantises.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dlora.quant.dequantize import chunk_rows
from dlora.quant.factored import FACTORS, FactoredWeight, factored_weight, is_factored
from dlora.quant.formats import FORMATS, unpack, unpack_after
from dlora.quant.made_class import made_class

CODES, SCALES = "weight_codes", "weight_scales"
WEIGHT_NAMES = ("weight", CODES, SCALES, *FACTORS)
_FACTORED = "factored"  # what `save_with` notes in the place of a packing


@dataclass(frozen=True)
class Packing:
    """How a weight is packed.

    Attributes:
        name: of the format.
        n: weights in a row.
        dtype: of the weight before it was packed.
        transposed: the weight is the transpose of the packed matrix.
    """

    name: str
    n: int
    dtype: torch.dtype
    transposed: bool = False

    def whole(
        self, codes: Tensor, scales: Tensor, dtype: torch.dtype, first: Tensor | None = None
    ) -> Tensor:
        """The weight in `dtype`; in a compiled graph not before there is `first`."""
        if first is not None and torch.compiler.is_compiling():
            weight = unpack_after(codes, scales, self.n, self.name, dtype, first)
        else:
            weight = unpack(codes, scales, self.n, self.name, dtype)
        return weight.t() if self.transposed else weight


@dataclass(frozen=True)
class PackedWeight:
    """The packed weight of a layer, in place of a tensor [m, n]."""

    codes: Tensor
    scales: Tensor
    packing: Packing

    def t(self) -> PackedWeight:
        """Its transpose."""
        packing = replace(self.packing, transposed=not self.packing.transposed)
        return replace(self, packing=packing)

    def to(self, dtype: torch.dtype) -> PackedWeight:
        """Itself: it is de-quantised to the dtype of the other factor."""
        return self


Weight = Tensor | PackedWeight | FactoredWeight


def whole(weight: Weight, dtype: torch.dtype, first: Tensor | None = None) -> Tensor:
    """The weight as a tensor: a packed one is de-quantised to `dtype`, factors are multiplied in
    it, a tensor is returned as it is.

    Do not store the result: it is as large as the unpacked weight.

    Args:
        first: of a backward pass, the gradient, in front of which there is no use for the weight.
    """
    if isinstance(weight, PackedWeight):
        return weight.packing.whole(weight.codes, weight.scales, dtype, first)
    return weight.to(dtype).whole() if isinstance(weight, FactoredWeight) else weight


def multiply(x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    """x Wᵀ + b in the dtype of x, inside a function that has its own backward."""
    if isinstance(weight, FactoredWeight):
        return weight.product(x, bias)
    return F.linear(x, whole(weight, x.dtype), bias)


def multiply_back(dy: Tensor, weight: Weight) -> Tensor:
    """dy W in the dtype of dy."""
    if isinstance(weight, FactoredWeight):
        return weight.times(dy)
    return dy @ whole(weight, dy.dtype, dy)


def save_with(ctx: Any, weight: Weight, *tensors: Tensor | None) -> None:
    """`ctx.save_for_backward` for a weight and tensors; of a packed weight its codes and scales.

    An engine that frees the parameters and gathers them again fills the same tensors.
    """
    if isinstance(weight, PackedWeight):
        ctx.packing = weight.packing
        ctx.save_for_backward(weight.codes, weight.scales, *tensors)
    elif isinstance(weight, FactoredWeight):
        ctx.packing = _FACTORED
        ctx.save_for_backward(weight.B, weight.A, *tensors)
    else:
        ctx.packing = None
        ctx.save_for_backward(weight, *tensors)


def saved_with(ctx: Any) -> tuple[Any, ...]:
    """The weight and the tensors that `save_with` saved."""
    if ctx.packing is None:
        return ctx.saved_tensors
    one, other, *tensors = ctx.saved_tensors
    if isinstance(ctx.packing, str):
        return FactoredWeight(one, other), *tensors
    return PackedWeight(one, other, ctx.packing), *tensors


class _Product(torch.autograd.Function):
    """y = x Wᵀ + b for x [..., n], W [m, n] packed and frozen; the gradient goes to x alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
        save_with(ctx, weight)
        return F.linear(x, whole(weight, x.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = saved_with(ctx)
        return grads[0] @ whole(weight, grads[0].dtype, grads[0]), None, None


def product(x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    """`F.linear`; under `torch.autocast` in autocast's dtype."""
    if isinstance(weight, FactoredWeight):
        return weight.product(x, bias)
    if not isinstance(weight, PackedWeight):
        return F.linear(x, weight, bias)
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
        bias = None if bias is None else bias.to(x.dtype)
    return _Product.apply(x, weight, bias)


class PackedMixin:
    """A linear layer whose weight is packed, or was packed before."""

    packing: Packing
    transposed: bool  # the weight is stored [in, out], as that of a Conv1D

    def forward(self: Any, x: Tensor) -> Tensor:
        weight = frozen_weight(self)
        if not isinstance(weight, PackedWeight):
            return super().forward(x)  # type: ignore[misc]
        return product(x, weight.t() if self.transposed else weight, self.bias)


def is_packed(module: nn.Module) -> bool:
    """Whether the weight is packed now."""
    return isinstance(module, PackedMixin) and CODES in module._parameters


def frozen_weight(module: Any) -> Weight:
    """The weight of a linear layer, [k, n] as it is stored."""
    if is_factored(module):
        return factored_weight(module)
    if not is_packed(module):
        return module.weight
    return PackedWeight(module.weight_codes, module.weight_scales, module.packing)


@torch.no_grad()
def pack(module: nn.Module, name: str, *, transposed: bool = False) -> None:
    """Pack the weight of a linear layer, in place; also on the meta device.

    Args:
        name: of the format.
        transposed: the weight is stored [in, out], as that of a Conv1D.
    """
    weight: Tensor = module.get_parameter("weight")
    k, n = weight.shape
    fmt, where = FORMATS[name], {"dtype": torch.uint8, "device": weight.device}
    codes = torch.empty(k, fmt.code_bytes(n), **where)  # type: ignore[call-overload]
    scales = torch.empty(k, fmt.scale_bytes(n), **where)  # type: ignore[call-overload]
    if not weight.is_meta:
        for rows in chunk_rows(codes):
            codes[rows], scales[rows] = fmt.codes(weight[rows]), fmt.scales(weight[rows])
    _put(module, {"weight": None, CODES: codes, SCALES: scales})
    module.packing = Packing(name, n, weight.dtype)  # type: ignore[assignment]
    base: Any = type(module)
    module.__class__ = _packed_class(base, transposed)


@torch.no_grad()
def unpacked(module: nn.Module) -> Tensor:
    """The weight of a layer, [k, n] as it is stored; a packed one in its dtype before packing."""
    weight = frozen_weight(module)
    if isinstance(weight, PackedWeight):
        return whole(weight, weight.packing.dtype)
    return whole(weight, weight.dtype).detach()


def replace_weight(module: nn.Module, weight: Tensor) -> dict[str, nn.Parameter]:
    """Replace the weight of a layer, packed or not, by a whole frozen one, [k, n] as it is stored.

    Returns:
        The replaced parameters, for `restore_weight`.
    """
    originals = {n: module.get_parameter(n) for n in WEIGHT_NAMES if n in module._parameters}
    _put(module, {**dict.fromkeys(WEIGHT_NAMES), "weight": weight})
    return originals


def restore_weight(module: nn.Module, originals: dict[str, nn.Parameter]) -> None:
    """Undo `replace_weight`."""
    _put(module, {"weight": None, **originals})


def _put(module: nn.Module, tensors: dict[str, Any]) -> None:
    """Set frozen parameters in front of the others; None removes one."""
    rest = {n: p for n, p in module._parameters.items() if n not in tensors}
    given = {n: t for n, t in tensors.items() if t is not None}
    module._parameters.clear()
    for name, tensor in given.items():
        is_parameter = isinstance(tensor, nn.Parameter)
        frozen = tensor if is_parameter else nn.Parameter(tensor, requires_grad=False)
        module.register_parameter(name, frozen)
    module._parameters.update(rest)


@functools.cache
def _packed_class(base: Any, transposed: bool) -> type:
    """The subclass of `base` whose weight is packed. Cached: equal layers share one class."""
    name, given = f"Packed{base.__name__}", (base, transposed)
    return made_class(PackedMixin, base, name, _packed_class, *given, transposed=transposed)
