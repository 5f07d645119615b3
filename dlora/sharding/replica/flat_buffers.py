"""Flat buffers in which parameters are laid end to end."""

from __future__ import annotations

import torch
from torch import Tensor

from dlora.sharding.replica.optimizer_state import Named, ReplicaError


def common_kind(named: Named) -> tuple[torch.dtype, torch.device]:
    """The one dtype and device of all parameters.

    Raises:
        ReplicaError: there are none, or they differ.
    """
    if not named:
        raise ReplicaError("there is nothing to train: no parameter requires a gradient")
    kinds = {(p.dtype, p.device) for p in named.values()}
    if len(kinds) > 1:
        listed = ", ".join(sorted(f"{dtype} on {device}" for dtype, device in kinds))
        raise ReplicaError(f"trainable parameters must share one dtype and device, not {listed}")
    return next(iter(kinds))


def views_of(flat: Tensor, named: Named) -> dict[str, Tensor]:
    """Views of a flat tensor in the shapes of parameters that are laid end to end in it."""
    views, offset = {}, 0
    for name, parameter in named.items():
        views[name] = flat[offset : offset + parameter.numel()].view(parameter.shape)
        offset += parameter.numel()
    return views
