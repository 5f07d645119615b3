"""Packs the weights of the linear layers in a model's blocks.

Embeddings, output head, norms and biases are not packed, as in other quantisation tools.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dlora.base.skeleton import pinned_dtypes
from dlora.errors import UsageError, and_more
from dlora.lora.layers import AdaptedLayer, layer_kind
from dlora.lora.names import attached
from dlora.lora.targets import linear_paths, readers_of_weights
from dlora.lora.weight_reads import weights_asked_for
from dlora.quant.factored import is_factored
from dlora.quant.formats import FORMATS
from dlora.quant.linear import CODES, SCALES, Packing, is_packed, pack
from dlora.sharding.engines.gather_groups import block_lists
from dlora.sharding.engines.protocol import is_divided


@dataclass(frozen=True)
class Quantized:
    """The result of `quantize`.

    Attributes:
        name: of the format.
        packed: paths of the layers whose weight is packed now.
        weights: number of packed weights.
        nbytes: bytes of their codes and scales.
        left: {path: why it is not packed} of other matrices in the blocks.
    """

    name: str
    packed: tuple[str, ...]
    weights: int
    nbytes: int
    left: dict[str, str]

    def __str__(self) -> str:
        """A line for the user."""
        bits = 8 * self.nbytes / self.weights
        line = (
            f"{self.name}: {len(self.packed)} linear layers are packed, {self.weights / 1e6:,.1f} "
            f"M weights in {self.nbytes / 1e6:,.1f} MB ({bits:.2f} bits each)"
        )
        for reason in dict.fromkeys(self.left.values()):
            paths = [path for path, why in self.left.items() if why == reason]
            line += f"; not packed: {and_more(paths, 1)} ({reason})"
        return line


def quantize(model: nn.Module, quantization: str) -> Quantized:
    """Pack the weights of the linear layers of a model's blocks, in place, before `attach`.

    `X.weight` becomes `X.weight_codes` and `X.weight_scales`; nothing else changes.

    Args:
        model: with whole weights, or on the meta device.
        quantization: `"nf4"`, `"nf4-dq"`, `"int8"` or `"fp8"`.

    Raises:
        UsageError: there is no such format, no layer can be packed, or the model has adapters, is
            sharded or is packed already.
    """
    fmt = FORMATS.get(quantization)
    if fmt is None:
        raise UsageError(
            f"quantization: {quantization!r} is unknown; expected one of {', '.join(FORMATS)}"
        )
    if attached(model):
        raise UsageError("quantize: this model already has adapters; call quantize before attach")
    if any(map(is_divided, model.parameters())):
        raise UsageError("quantize: this model is already sharded; call quantize before shard")
    if any(map(is_packed, model.modules())):
        raise UsageError("quantize: this model is already packed")
    if any(map(is_factored, model.modules())):
        raise UsageError(
            "quantization: cannot act on a compressed model, whose weights are products"
        )
    packed, weights, nbytes = [], 0, 0
    left = dict(_not_linear(model))
    for path, why in replaceable(model).items():
        module = model.get_submodule(path)
        k, n = module.get_parameter("weight").shape
        if why:
            left[path] = why
        elif n % fmt.block:
            left[path] = f"its rows have {n} weights, not a multiple of the block size {fmt.block}"
        else:
            kind: Any = layer_kind(module) or AdaptedLayer
            pack(module, quantization, transposed=kind.transposed)
            packed.append(path)
            weights, nbytes = weights + k * n, nbytes + k * (fmt.code_bytes(n) + fmt.scale_bytes(n))
    if not packed:
        first = next(iter(left.items()), None)
        reason = f": {first[0]}: {first[1]}" if first else " in the blocks of this model"
        raise UsageError(f"quantization: {quantization} cannot act on any linear layer{reason}")
    return Quantized(quantization, tuple(packed), weights, nbytes, left)


def replaceable(model: nn.Module) -> dict[str, str]:
    """{linear layer of the blocks: why its weight has to stay as it is, or ""}, in two parts: first
    those whose weight another module reads, then the others in the model's order.
    """
    uses, asked = _uses(model), weights_asked_for(model)
    found = {p: f"{r} reads its weight itself" for p, r in readers_of_weights(model).items()}
    for path in _linear_in_blocks(model):
        if path in asked:
            found[path] = f"{asked[path]} asks for its weight, which a packed layer has not"
        elif _must_be_float32(model, path):
            found[path] = "the model needs it in float32"
        elif uses[id(model.get_submodule(path).weight)] > 1:
            found[path] = "it shares its weight with another module"
        else:
            found[path] = ""
    return found


def quantize_as_set(model: nn.Module, setting: str) -> Quantized | None:
    """Call `quantize` with the value of `model.quantization`; returns None for `"none"`."""
    if setting == "none":
        return None
    try:
        return quantize(model, setting)
    except UsageError as error:
        raise UsageError(f"model.{error}") from error


@dataclass(frozen=True)
class FrozenMatrix:
    """A frozen parameter of two dims or more, as its layer computes with it.

    Attributes:
        transient: bytes of its de-quantised copy during a product; 0: it is not packed.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    transient: int


def frozen_matrices(model: nn.Module) -> Iterator[FrozenMatrix]:
    """The frozen matrices of a model; a packed one with the shape and dtype of its weight."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if is_packed(module) and name in (CODES, SCALES):
                if name == CODES:
                    packing: Packing = module.packing  # type: ignore[assignment]
                    shape, dtype = (parameter.shape[0], packing.n), packing.dtype
                    yield FrozenMatrix(shape, dtype, math.prod(shape) * dtype.itemsize)
            elif parameter.ndim > 1 and not parameter.requires_grad:
                yield FrozenMatrix(tuple(parameter.shape), parameter.dtype, 0)


def _linear_in_blocks(model: nn.Module) -> list[str]:
    inside = tuple(f"{path}." for path in block_lists(model))
    return [path for path in linear_paths(model) if not inside or path.startswith(inside)]


def _not_linear(model: nn.Module) -> Iterator[tuple[str, str]]:
    """(path, reason) of the matrices in the blocks that belong to no linear layer."""
    for path in block_lists(model):
        for name, parameter in model.get_submodule(path).named_parameters():
            if parameter.ndim > 2:
                yield f"{path}.{name}", "it is not the weight of a linear layer"


def _uses(model: nn.Module) -> Counter[int]:
    """{id of a parameter: number of modules that have it}."""
    return Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))


def _must_be_float32(model: Any, path: str) -> bool:
    """Whether the class pins the weight in any dtype; in float16 it pins all that it ever does."""
    return bool(pinned_dtypes(model, [f"{path}.weight"], torch.float16))
