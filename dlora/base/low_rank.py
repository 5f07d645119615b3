"""A base that `dlora compress` wrote: its configuration says which weights are products.

config.json        "dlora_low_rank": {path of a linear layer: k}
low_rank-*         ….weight_B [m, k] and ….weight_A [k, n] in the place of ….weight
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from dlora.errors import UsageError
from dlora.lora.layers import AdaptedConv1D, AdaptedLinear, layer_kind
from dlora.quant.factored import FACTORS, factor, is_factored

KEY = "dlora_low_rank"


def low_ranks(config: Any) -> dict[str, int] | None:
    """{path: k} of a configuration, which has not been checked; None: it is no compressed base."""
    found: dict[str, int] | None = getattr(config, KEY, None)
    return found


def factor_keys(key: str) -> tuple[str, ...]:
    """The keys of B and A in the place of the key of a weight."""
    return tuple(key.removesuffix("weight") + name for name in FACTORS)


@contextmanager
def stand_ins(skeleton: nn.Module) -> Iterator[None]:
    """Inside, factored layers have an empty weight, which transformers draws as it draws others."""
    layers = [layer for layer in skeleton.modules() if is_factored(layer)]
    for layer in layers:
        layer.__dict__["weight"] = torch.empty(0, device="meta")
    try:
        yield
    finally:
        for layer in layers:
            del layer.__dict__["weight"]


def factor_as_stored(skeleton: nn.Module, config: Any, path: str) -> None:
    """Give the layers of a skeleton the factors that a compressed base has, in place.

    Args:
        path: of the base, for errors.

    Raises:
        UsageError: the configuration names what is no linear layer, or no rank of it.
    """
    ranks = low_ranks(config)
    if ranks is None:
        return
    where = f"model.path: {path}: config.json: {KEY}"
    if not isinstance(ranks, dict):
        raise UsageError(f"{where}: is no object")
    modules = dict(skeleton.named_modules())
    for name, k in ranks.items():
        layer: Any = modules.get(name)
        kind = layer_kind(layer) if layer is not None else None
        if kind not in (AdaptedLinear, AdaptedConv1D):
            raise UsageError(f"{where}: {name} is no linear layer of the model")
        if type(k) is not int or not 1 <= k <= min(kind.shape(layer)):
            raise UsageError(f"{where}: {name}: {k!r} is no rank of a {list(kind.shape(layer))}")
        factor(layer, k, transposed=kind.transposed)
