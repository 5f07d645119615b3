"""Adapted layers: base modules that carry an adapter, and how each kind asks it for its product.

A layer stays the same object. Its class is replaced by a subclass that has the same parameters
under the same names and an extra child, `adapter`; nothing is wrapped, so `q_proj.weight` stays
`q_proj.weight`, and base checkpoints, wrapping policies and hooks work as before.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from dlora.lora.obstacles import CONVOLUTIONS, obstacle
from dlora.lora.own_forward import computes_embedding, computes_linear, embed_scale
from dlora.quant.factored import FactoredMixin
from dlora.quant.linear import (
    WEIGHT_NAMES,
    PackedMixin,
    frozen_weight,
    replace_weight,
    restore_weight,
    unpacked,
)

CHILD = "adapter"
NAMED = "adapters"  # the child that has those with names, see `several`


def adapter_of(path: str) -> str:
    """The name of the adapter that has the tensor of this full name, `….adapters.NAME.lora_A`."""
    return path.rpartition(f".{NAMED}.")[2].partition(".")[0]


def acting(layer: nn.Module) -> Any:
    """What a layer computes with beside its weight: its adapter, several of them, or None."""
    children = layer._modules
    found = children.get(NAMED)
    if found is None:
        found = children.get(CHILD)
    return found if found is not None and found.active else None


class AdaptedLayer:
    """Base of all kinds: the layer passes its weight to `adapter`, which computes."""

    is_embedding = False
    transposed = False  # True where the weight is stored [in, out]
    weight_names: tuple[str, ...] = (
        WEIGHT_NAMES  # of the weight, packed or not, in the module that has it
    )

    @staticmethod
    def accepts(module: nn.Module) -> bool:
        """Whether `module` is of this kind, and has the kind's own forward."""
        raise NotImplementedError

    @staticmethod
    def shape(module: Any) -> tuple[int, int]:
        """(m, n) of the weight, from attributes: a partitioned tensor may not show its shape."""
        raise NotImplementedError

    @staticmethod
    def kernel(module: Any) -> tuple[int, ...]:
        """The kernel sizes of a convolution; () for any other layer."""
        return ()

    @classmethod
    def as_stored(cls, module: Any, delta: Tensor) -> Tensor:
        """ΔW [m, n] → the layout of the layer's weight."""
        return delta.t() if cls.transposed else delta

    @classmethod
    def as_product(cls, weight: Tensor) -> Tensor:
        """The layer's weight → [m, n]."""
        return weight.t() if cls.transposed else weight.flatten(1)

    def whole_weight(self: Any) -> Tensor:
        """The weight as it is stored; a packed one in its dtype before packing."""
        return unpacked(self)

    def first_parameter(self: Any) -> tuple[str, nn.Parameter]:
        """Name and value of the weight, of a packed one of the first of its parts."""
        name = next(name for name in self.weight_names if name in self._parameters)
        return name, self.get_parameter(name)

    def replace(self: Any, weight: Tensor) -> dict[str, nn.Parameter]:
        """Put a whole frozen weight in the place of its own; returns the latter, for `restore`."""
        return replace_weight(self, weight)

    def restore(self: Any, originals: dict[str, nn.Parameter]) -> None:
        """Undo `replace`."""
        restore_weight(self, originals)

    @classmethod
    def gradient_times(
        cls, module: Any, x: Tensor, dy: Tensor, basis: Tensor, *, transposed: bool
    ) -> Tensor:
        """G·P [m, q], or Gᵀ·Q [n, q] if `transposed`, for the gradient G = dyᵀx of the weight.

        Args:
            x, dy: an input of the layer, and the gradient of its output.
            basis: P [n, q], or Q [m, q]; the product has its dtype.
        """
        left, right = (x, dy) if transposed else (dy, x)
        left, right = (t.reshape(-1, t.shape[-1]).to(basis.dtype) for t in (left, right))
        return left.t() @ (right @ basis)


class AdaptedLinear(AdaptedLayer):
    """`nn.Linear`, or a subclass that computes the same: weight [out, in], packed or not."""

    @staticmethod
    def accepts(module: nn.Module) -> bool:
        if not isinstance(module, nn.Linear):
            return False
        own = (nn.Linear.forward, PackedMixin.forward, FactoredMixin.forward)
        return type(module).forward in own or computes_linear(module)

    @staticmethod
    def shape(module: Any) -> tuple[int, int]:
        return module.out_features, module.in_features

    def forward(self: Any, input: Tensor) -> Tensor:
        adapter = acting(self)
        if adapter is None:
            return super().forward(input)  # type: ignore[misc]
        return adapter.linear(input, frozen_weight(self), self.bias)


class AdaptedConv1D(AdaptedLayer):
    """transformers' `Conv1D` (GPT-2), known by its attributes: weight [in, out], y = x W + b."""

    transposed = True

    @staticmethod
    def accepts(module: nn.Module) -> bool:
        if isinstance(module, (PackedMixin, FactoredMixin)):
            return module.transposed
        return (
            type(module).__name__.removeprefix("FSDP") == "Conv1D"
            and isinstance(getattr(module, "nf", None), int)
            and isinstance(getattr(module, "nx", None), int)
            and isinstance(getattr(module, "weight", None), nn.Parameter)
        )

    @staticmethod
    def shape(module: Any) -> tuple[int, int]:
        return module.nf, module.nx

    def forward(self: Any, x: Tensor) -> Tensor:
        adapter = acting(self)
        if adapter is None:
            return super().forward(x)  # type: ignore[misc]
        return adapter.linear(x, frozen_weight(self).t(), self.bias)


class AdaptedEmbedding(AdaptedLayer):
    """`nn.Embedding`: weight [V, dim]; ΔW of row v is s·B·A[:, v], so (m, n) = (dim, V).

    Where the layer has an `embed_scale` c (Gemma), y = c·(W0 + ΔW)[ids], as in PEFT.
    """

    is_embedding = True
    transposed = True

    @staticmethod
    def accepts(module: nn.Module) -> bool:
        return (
            isinstance(module, nn.Embedding)
            and obstacle(module) is None
            and (type(module).forward is nn.Embedding.forward or computes_embedding(module))
        )

    @staticmethod
    def shape(module: Any) -> tuple[int, int]:
        return module.embedding_dim, module.num_embeddings

    def forward(self: Any, input: Tensor) -> Tensor:
        adapter = acting(self)
        if adapter is None:
            return super().forward(input)  # type: ignore[misc]
        y = adapter.embedding(input, self.weight, self.padding_idx)
        return y * embed_scale(self, y.dtype) if hasattr(self, "embed_scale") else y

    @classmethod
    def gradient_times(
        cls, module: Any, x: Tensor, dy: Tensor, basis: Tensor, *, transposed: bool
    ) -> Tensor:
        ids_T, dy_Tm = x.reshape(-1), dy.reshape(-1, dy.shape[-1]).to(basis.dtype)
        dy_Tm = dy_Tm * embed_scale(module, dy_Tm.dtype)
        if module.padding_idx is not None:
            dy_Tm = dy_Tm.masked_fill((ids_T == module.padding_idx)[:, None], 0)
        if not transposed:
            return dy_Tm.t() @ basis[ids_T]
        rows = basis.new_zeros(module.num_embeddings, basis.shape[1])
        return rows.index_add_(0, ids_T, dy_Tm @ basis)


class AdaptedConvolution(AdaptedLayer):
    """`nn.Conv1d`, `2d` or `3d`: weight [out, in, *kernel], of which n is all but the first.

    Of a grouped or dilated convolution, or one that pads with other than zeros, PEFT's form is no
    update of W0: such a layer cannot carry an adapter.
    """

    @staticmethod
    def accepts(module: nn.Module) -> bool:
        return isinstance(module, CONVOLUTIONS) and obstacle(module) is None

    @staticmethod
    def shape(module: Any) -> tuple[int, int]:
        return module.out_channels, module.in_channels * math.prod(module.kernel_size)

    @staticmethod
    def kernel(module: Any) -> tuple[int, ...]:
        return module.kernel_size

    @classmethod
    def as_stored(cls, module: Any, delta: Tensor) -> Tensor:
        return delta.reshape(-1, module.in_channels, *module.kernel_size)

    def forward(self: Any, input: Tensor) -> Tensor:
        adapter = acting(self)
        if adapter is None:
            return super().forward(input)  # type: ignore[misc]
        return adapter.convolution(input, self.weight, self.bias, self._conv_forward)

    @classmethod
    def gradient_times(
        cls, module: Any, x: Tensor, dy: Tensor, basis: Tensor, *, transposed: bool
    ) -> Tensor:
        shape = module.out_channels, module.in_channels, *module.kernel_size
        with torch.enable_grad():  # linear in the weight, so its value does not matter
            weight = basis.new_zeros(shape, requires_grad=True)
            y = module._conv_forward(x.to(basis.dtype), weight, None)
            (stored,) = torch.autograd.grad(y, weight, dy.to(basis.dtype))
        gradient = cls.as_product(stored)
        return (gradient.t() if transposed else gradient) @ basis


LAYERS: tuple[type[AdaptedLayer], ...] = (
    AdaptedLinear,
    AdaptedConv1D,
    AdaptedEmbedding,
    AdaptedConvolution,
)


def layer_kind(module: nn.Module) -> type[AdaptedLayer] | None:
    """The kind of adapted layer that `module` is or can become, or None."""
    if isinstance(module, AdaptedLayer):
        return next(kind for kind in LAYERS if isinstance(module, kind))
    return next((kind for kind in LAYERS if kind.accepts(module)), None)
