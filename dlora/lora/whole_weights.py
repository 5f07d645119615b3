"""Whole weights W0, one module at a time, for what `attach` computes from them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from dlora.errors import UsageError
from dlora.lora.layers import AdaptedLayer
from dlora.lora.variants import LoraAdapter
from dlora.quant.factored import FACTORS, FactoredWeight, is_factored
from dlora.quant.linear import CODES, SCALES, is_packed

WholeWeights = Callable[[nn.Module], AbstractContextManager[dict[str, Tensor]]]


@torch.no_grad()
def show_weights(
    named: Iterable[tuple[str, nn.Module, LoraAdapter]], whole_weights: WholeWeights | None
) -> None:
    """Show every adapter that needs it the weight of its layer; nothing on the meta device.

    One weight is whole at a time. Collective where the base is sharded: every rank takes the
    modules in the same order.

    Args:
        named: (path, layer, adapter), as `named_adapters` yields them.
        whole_weights: as of `attach`.

    Raises:
        UsageError: the base is sharded, and there is no `gather_module`.
    """
    for path, layer, adapter in named:
        if not adapter.needs_weight or adapter.lora_A.is_meta:
            continue
        assert isinstance(layer, AdaptedLayer)
        with (whole_weights or plain_weights(f"attach: {path}"))(layer) as weights:
            adapter.see_weight(layer.as_product(_dense(layer, weights)))


def plain_weights(what: str) -> WholeWeights:
    """A `WholeWeights` for a base that is not sharded: the parameters of a module as they are.

    Args:
        what: needs them; the `UsageError` about a sharded parameter begins with it.
    """

    def plain(module: nn.Module) -> AbstractContextManager[dict[str, Tensor]]:
        weights = {path: parameter.detach() for path, parameter in module.named_parameters()}
        for path, weight in weights.items():
            if type(weight) is not Tensor or hasattr(module.get_parameter(path), "ds_id"):
                raise UsageError(f"{what}: {path} is sharded; call dlora.shard first")
        return nullcontext(weights)

    return plain


def _dense(layer: Any, weights: dict[str, Tensor]) -> Tensor:
    """The weight as its layer stores it; a packed one in the dtype that it had."""
    if is_factored(layer):
        weight = FactoredWeight(*(weights[name] for name in FACTORS)).whole()
        return weight.t() if layer.transposed else weight
    if not is_packed(layer):
        return weights["weight"]
    return layer.packing.whole(weights[CODES], weights[SCALES], layer.packing.dtype)
