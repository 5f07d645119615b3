"""`merge` and `unmerge`: write W0 + ΔW where W0 was, and get W0 back bit for bit.

An adapter that rescales rows (DoRA) amounts to diag(d)·(W0 + ΔW). What merging adds to W0 is then
diag(d)·(W0 + ΔW) − W0, in the place of ΔW.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dlora.errors import UsageError, dtype_name
from dlora.lora.attach import (
    attachment_of,
    every_child,
    named_adapters,
    named_copies,
    owner_of,
)
from dlora.lora.layers import AdaptedLayer
from dlora.lora.names import active, by_name
from dlora.lora.states import AdapterState
from dlora.lora.variants import LoraAdapter

LOSS_WORTH_A_WARNING = 0.01


@dataclass(frozen=True)
class Merged:
    """One merged weight, and the share of ΔW that was lost in rounding to its dtype."""

    weight: Tensor
    loss: float


def merged_weight(weight: Tensor, delta: Tensor, dtype: torch.dtype | None = None) -> Merged:
    """W = cast(float32(W0) + ΔW), added in float32 (float64 for a float64 base) and cast once.

    Args:
        weight: W0, [m, n] or transposed; delta: ΔW of the same shape, float32 or float64.
        dtype: of W; by default that of W0.

    The loss is ‖(W − W0) − ΔW‖ / ‖ΔW‖, 0 for ΔW = 0.
    """
    base = weight.to(delta.dtype)
    merged = (base + delta).to(dtype or weight.dtype)
    norm = delta.norm()
    loss = ((merged.to(delta.dtype) - base) - delta).norm() / norm if norm > 0 else norm
    return Merged(merged, float(loss))


def scale_of_rows(
    layer: AdaptedLayer,
    adapter: LoraAdapter,
    delta: Tensor,
    slices: Iterable[tuple[int, int, Tensor]],
) -> Tensor | None:
    """d of each element's row, expanded to the shape of ΔW; None for ones.

    Args:
        delta: ΔW as the layer stores its weight.
        slices: (first, last, W0[first:last]) along the first dim, all of W0 in their order.
    """
    if not adapter.rescales_rows:
        return None
    sums = (
        (weight.to(delta.dtype) + delta[first:last]).square_().flatten(1)
        for first, last, weight in slices
    )
    if layer.transposed:  # a row of W0 is a column of what is stored
        squares = sum((part.sum(0) for part in sums), torch.zeros(()).to(delta))
        return adapter.row_scale(squares.sqrt()).expand_as(delta)
    scale = adapter.row_scale(torch.cat([part.sum(1) for part in sums]).sqrt())
    return scale.view(-1, *(1 for _ in delta.shape[1:])).expand_as(delta)


def change_of(weight: Tensor, delta: Tensor, scale: Tensor | None) -> Tensor:
    """What merging adds to W0: d⊙(W0 + ΔW) − W0, computed as d⊙ΔW + (d − 1)⊙W0; ΔW without a d."""
    return delta if scale is None else scale * delta + (scale - 1) * weight.to(delta.dtype)


@torch.no_grad()
def merge(model: nn.Module) -> nn.Module:
    """Replace every adapted W0 by W0 + ΔW and switch the adapters off, in place.

    Of adapters with names, ΔW is the sum of those that are active.

    The original parameters are stored whole (one copy of the adapted weights), so that
    `unmerge` restores them bit for bit. A tied weight is untied: only the adapted side changes. A
    packed W0 is unpacked to the dtype that it had before, and not packed again: that would round
    most of ΔW away.

    Warns when rounding to the base's dtype loses more than 1 % of a ΔW.

    Raises:
        UsageError: merged already, the base is sharded (`dlora.export --merge` streams it), or a
            W0 + ΔW is not finite; nothing was merged then.
    """
    _check_mergeable(model)
    summed, copies = _active(model)
    merged = {path: _merged(path, *found) for path, found in summed.items()}
    originals: dict[str, nn.Parameter] = {}
    for path, (layer, _) in summed.items():
        owner = owner_of(path, layer)
        taken = layer.replace(merged[path].weight)
        originals |= {f"{owner}.{name}": parameter for name, parameter in taken.items()}
    for path, layer, copy in copies:
        for name, value in copy.cast().items():
            originals[f"{path}.{name}"] = layer.get_parameter(name)
            value = value.clone()  # never the master itself
            _set_parameter(model, f"{path}.{name}", nn.Parameter(value, requires_grad=False))
    for child in every_child(model):
        if child.state is not AdapterState.EMPTY:
            child.become(AdapterState.MERGED)
    model.dlora_originals = originals  # type: ignore[assignment]
    warn_of_rounding({path: result.loss for path, result in merged.items()})
    return model


@torch.no_grad()
def unmerge(model: nn.Module) -> nn.Module:
    """Restore the parameters that `merge` replaced, and switch the adapters on again.

    Raises:
        UsageError: the model is not merged.
    """
    originals = model.__dict__.pop("dlora_originals", None)
    if originals is None:
        raise UsageError("unmerge: this model is not merged")
    for child in every_child(model):
        if child.state is not AdapterState.EMPTY:
            child.become(AdapterState.ON)
    for path, (layer, _) in _active(model)[0].items():
        owner = owner_of(path, layer)
        names = [name for name in layer.weight_names if f"{owner}.{name}" in originals]
        layer.restore({name: originals.pop(f"{owner}.{name}") for name in names})
    for path, original in originals.items():
        _set_parameter(model, path, original)
    return model


def warn_of_rounding(losses: dict[str, float]) -> None:
    """One warning for all weights whose merge lost more than 1 % of ΔW to rounding."""
    if line := rounding_line(losses, "the base's dtype"):
        warnings.warn(line, stacklevel=3)


def rounding_line(losses: dict[str, float], dtype: str) -> str | None:
    """The warning about merges into `dtype` that lost more than 1 % of ΔW to rounding, or None."""
    lossy = {path: loss for path, loss in losses.items() if loss > LOSS_WORTH_A_WARNING}
    if not lossy:
        return None
    worst = max(lossy, key=lossy.__getitem__)
    return (
        f"merge: rounding to {dtype} loses more than 1 % of ΔW in {len(lossy)} of "
        f"{len(losses)} weights (worst: {lossy[worst]:.1%} in {worst}); "
        "keep the adapter beside the base, or merge into float32"
    )


def is_merged(model: nn.Module) -> bool:
    """Whether `merge` has replaced the weights of the model."""
    return "dlora_originals" in model.__dict__


def _check_mergeable(model: nn.Module) -> None:
    if not active(model):
        attachment_of(model)
    if is_merged(model):
        raise UsageError("merge: this model is merged already")
    for child in every_child(model):
        if not getattr(child, "mergeable", True):
            raise UsageError(
                f"merge: a {child.name} adapter has another ΔW for each token, so it cannot be "
                "merged into W0"
            )
        if child.state not in (AdapterState.ON, AdapterState.EMPTY):
            path = child.place.rpartition(".")[0]
            raise UsageError(f"merge: the adapter of {path} {child.state.value}")
    for path, (layer, _) in _active(model)[0].items():
        name, parameter = layer.first_parameter()
        if type(parameter.data) is not Tensor:
            raise UsageError(
                f"merge: {owner_of(path, layer)}.{name} is sharded; save the adapter and use "
                "dlora.export --merge"
            )


def _active(
    model: nn.Module,
) -> tuple[dict[str, tuple[AdaptedLayer, list[LoraAdapter]]], list[tuple[str, Any, Any]]]:
    """(layer and active adapters by path; path, layer and trained copy of the active names)."""
    summed: dict[str, tuple[AdaptedLayer, list[LoraAdapter]]] = {}
    copies: list[tuple[str, Any, Any]] = []
    for name in active(model):
        with by_name(model, name):
            copies += named_copies(model)
            for path, layer, adapter in named_adapters(model):
                summed.setdefault(path, (layer, []))[1].append(adapter)
    return summed, copies


def _merged(path: str, layer: AdaptedLayer, adapters: list[LoraAdapter]) -> Merged:
    weight, changes = layer.whole_weight(), []
    for adapter in adapters:
        delta = layer.as_stored(layer, adapter.addend())
        scale = scale_of_rows(layer, adapter, delta, [(0, len(weight), weight)])
        changes.append(change_of(weight, delta, scale))
    result = merged_weight(weight, sum(changes[1:], changes[0]))
    if not result.weight.isfinite().all() and weight.isfinite().all():
        raise UsageError(
            f"merge: {path}: W0 + ΔW has NaN or infinite values in {dtype_name(weight.dtype)}; "
            "nothing was merged"
        )
    return result


def _set_parameter(model: nn.Module, path: str, parameter: nn.Parameter) -> None:
    owner, _, name = path.rpartition(".")
    setattr(model.get_submodule(owner), name, parameter)
