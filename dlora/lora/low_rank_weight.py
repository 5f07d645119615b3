"""A weight W0 + s·L·R in products, without ever forming it where the product allows.

    x (W0 + s·L R) = x W0 + s·(x L) R          (W0 + s·L R) x = W0 x + s·L (R x)

    W0 [..., p, q],  L [..., p, k],  R [..., k, q],  k = LoRA rank

A `LowRankWeight` takes the place of a parameter while its module computes. Slices, transposes and
products of it stay of this form, so the stacked weights of experts, [E, out, in], are multiplied
expert by expert with their own slices of L and R. Any other use gets the whole matrix, which is
what PEFT forms for every use.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dlora.lora import functional
from dlora.lora.master_products import by_master

_ALIGNED_BYTES = 16  # torch's grouped product takes strides that are multiples of this


class LowRankWeight:
    """W0 + scaling·left·right; see above.

    Args:
        weight: W0, a frozen tensor.
        left, right: L and R, in the masters' dtype or in that of W0.
    """

    def __init__(self, weight: Tensor, left: Tensor, right: Tensor, scaling: float) -> None:
        self.weight, self.left, self.right, self.scaling = weight, left, right, scaling

    @functools.cached_property
    def whole(self) -> Tensor:
        """The matrix itself."""
        left, right = self._cast()
        return self.weight + (left @ right) * self.scaling

    def plus(self, other: LowRankWeight) -> LowRankWeight:
        """W0 + s·L·R + s'·L'·R', of another one with the same W0."""
        left = torch.cat([self.left * self.scaling, other.left * other.scaling], dim=-1)
        right = torch.cat([self.right, other.right], dim=-2)
        return LowRankWeight(self.weight, left, right, 1.0)

    def _cast(self) -> tuple[Tensor, Tensor]:
        return self.left.to(self.weight.dtype), self.right.to(self.weight.dtype)

    # -- what stays of this form ------------------------------------------------------------------

    def __getitem__(self, index: Any) -> Any:
        is_scalar = isinstance(index, Tensor) and index.ndim == 0 and not index.is_floating_point()
        if self.weight.ndim != 3 or not (is_scalar or isinstance(index, (int, Tensor))):
            return self.whole[index]
        if isinstance(index, int) or is_scalar:
            number = int(index)
            lefts, rights = self._slices
            return LowRankWeight(self.weight[number], lefts[number], rights[number], self.scaling)
        if index.ndim != 1:
            return self.whole[index]
        return LowRankWeight(self.weight[index], self.left[index], self.right[index], self.scaling)

    @functools.cached_property
    def _slices(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """L and R of every expert: taken apart once, so that backward puts them together once."""
        return self.left.unbind(0), self.right.unbind(0)

    def transpose(self, dim0: int, dim1: int) -> Any:
        last = {self.weight.ndim - 1, self.weight.ndim - 2}
        if {dim0 % self.weight.ndim, dim1 % self.weight.ndim} != last:
            return self.whole.transpose(dim0, dim1)
        return LowRankWeight(self.weight.mT, self.right.mT, self.left.mT, self.scaling)

    def t(self) -> Any:
        return self.transpose(0, 1)

    @property
    def mT(self) -> Any:  # noqa: N802 - torch's name
        return self.transpose(-2, -1)

    @property
    def T(self) -> Any:  # noqa: N802 - torch's name
        return self.transpose(0, 1) if self.weight.ndim == 2 else self.whole.T

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """Itself where nothing is to change, as `Tensor.to`."""
        moved = self.weight.to(*args, **kwargs)
        return self if moved is self.weight else self.whole.to(*args, **kwargs)

    # -- products ---------------------------------------------------------------------------------

    def times(self, x: Tensor, product: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """`product(x, W)`, which is linear in both."""
        low_rank = by_master(by_master(x, self.left, product), self.right, product)
        return product(x, self.weight).add(low_rank, alpha=self.scaling)

    def before(self, x: Tensor, product: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """`product(W, x)`, which is linear in both."""

        def after(x: Tensor, factor: Tensor) -> Tensor:
            return product(factor, x)

        low_rank = by_master(by_master(x, self.right, after), self.left, after)
        return product(self.weight, x).add(low_rank, alpha=self.scaling)

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """`F.linear(x, W, bias)`."""
        if self.weight.ndim != 2:
            return F.linear(x, self.whole, bias)
        return functional.linear(x, self.weight, bias, self.right, self.left, self.scaling)

    def grouped(self, x: Tensor, product: Callable[..., Tensor], **how: Any) -> Tensor:
        """`product(x, W, **how)` for rows of x that belong to one matrix of W each."""
        left, right = self.left, self.right
        unit = _ALIGNED_BYTES // x.element_size()
        if short := -left.shape[-1] % unit:
            left, right = F.pad(left, (0, short)), F.pad(right, (0, 0, 0, short))

        def multiply(rows: Tensor, factor: Tensor) -> Tensor:
            return product(rows, factor.contiguous(), **how)

        low_rank = by_master(by_master(x, left, multiply), right, multiply)
        return product(x, self.weight, **how).add(low_rank, alpha=self.scaling)

    def __matmul__(self, x: Tensor) -> Tensor:
        return self.before(x, torch.matmul)

    def __rmatmul__(self, x: Tensor) -> Tensor:
        return self.times(x, torch.matmul)

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is F.linear and isinstance(args[1], cls) and isinstance(args[0], Tensor):
            return args[1].linear(args[0], *args[2:], **kwargs)
        if function in _PRODUCTS and len(args) == 2 and not kwargs:
            first, second = args
            if isinstance(second, cls) and isinstance(first, Tensor):
                return second.times(first, function)
            if isinstance(first, cls) and isinstance(second, Tensor):
                return first.before(second, function)
        if _is_grouped(function) and isinstance(args[0], Tensor) and isinstance(args[1], cls):
            how = {key: value for key, value in kwargs.items() if value is not None}
            if set(how) == {"offs"}:
                return args[1].grouped(args[0], function, **how)
        if function in _TRANSPOSES and isinstance(args[0], cls):
            return args[0].transpose(*(args[1:] or (0, 1)))
        return function(*_whole(args), **_whole(kwargs))

    def __len__(self) -> int:
        return len(self.weight)

    def __getattr__(self, name: str) -> Any:
        """Shape, dtype and device are those of W0; all else is asked of the whole matrix."""
        if name in _OF_THE_BASE:
            return getattr(self.weight, name)
        if name.startswith("_") or not hasattr(Tensor, name):
            raise AttributeError(name)
        return getattr(self.whole, name)


def _of_whole(name: str) -> Callable[..., Any]:
    """The operator of that name, which Python looks up in the class, on the whole matrix."""

    def operate(self: LowRankWeight, *others: Any) -> Any:
        return getattr(self.whole, name)(*_whole(others))

    return operate


_OPERATORS = ["add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "rtruediv", "pow", "rpow"]
_OPERATORS += ["neg", "abs", "iter", "eq", "ne", "lt", "le", "gt", "ge", "bool", "float"]
for _name in (f"__{operator}__" for operator in _OPERATORS):
    setattr(LowRankWeight, _name, _of_whole(_name))
LowRankWeight.__hash__ = object.__hash__  # type: ignore[method-assign]

_OF_THE_BASE = {"dtype", "device", "shape", "ndim", "size", "dim", "numel", "is_cuda", "layout"}
_OF_THE_BASE |= {"is_meta", "element_size", "is_floating_point", "__len__"}
_PRODUCTS = {torch.matmul, torch.mm, torch.bmm, Tensor.matmul, Tensor.mm, Tensor.bmm}
_PRODUCTS |= {Tensor.__matmul__}
_TRANSPOSES = {torch.transpose, torch.t}


def _is_grouped(function: Any) -> bool:
    """Whether it is one of the functions that multiply rows by one matrix of a stack each."""
    return "grouped_mm" in getattr(function, "__name__", "")


def _whole(value: Any) -> Any:
    """`value` with whole matrices in the place of every `LowRankWeight`."""
    if isinstance(value, LowRankWeight):
        return value.whole
    if isinstance(value, (list, tuple)):
        return type(value)(map(_whole, value))
    return {key: _whole(inner) for key, inner in value.items()} if type(value) is dict else value
