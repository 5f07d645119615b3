"""How many parameters a model has and trains, as PEFT counts them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from dlora.quant.linear import is_packed


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(trained, all) parameters, as PEFT counts them: of packed weights those before packing."""
    packed = {
        id(parameter): elements
        for module in model.modules()
        if is_packed(module)
        for parameter, elements in _elements(module)
    }
    trained = every = 0
    for parameter in model.parameters():
        size = packed.get(id(parameter), getattr(parameter, "ds_numel", parameter.numel()))
        every += size
        trained += size if parameter.requires_grad else 0
    return trained, every


def _elements(module: Any) -> Iterator[tuple[nn.Parameter, int]]:
    """(parameter, elements of W0 that it stands for) of a packed layer."""
    codes = module.weight_codes
    yield codes, getattr(codes, "ds_shape", codes.shape)[0] * module.packing.n
    yield module.weight_scales, 0
