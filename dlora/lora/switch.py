"""Adapters switched off and on again by two calls; `attach.disabled` is the context for it."""

from __future__ import annotations

from torch import nn

from dlora.errors import UsageError
from dlora.lora.attach import every_child
from dlora.lora.states import AdapterState

_BEFORE = "state_before_off"


def switch_off(model: nn.Module) -> None:
    """Let the model compute as its base until `switch_on`; nothing where it does already.

    Raises:
        UsageError: the model is merged, so without adapters it is not its base.
    """
    if "dlora_originals" in model.__dict__:
        raise UsageError("disable_adapters: this model is merged; call dlora.unmerge first")
    for child in every_child(model):
        if child.state not in (AdapterState.OFF, AdapterState.EMPTY):
            setattr(child, _BEFORE, child.state)
            child.become(AdapterState.OFF)


def switch_on(model: nn.Module) -> None:
    """Let the adapters that `switch_off` has switched off compute again."""
    for child in every_child(model):
        before = child.__dict__.pop(_BEFORE, None)
        if before is not None and child.state is AdapterState.OFF:
            child.become(before)
