"""What a checkpoint's `state.json` records of the adapter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from dlora.errors import UsageError
from dlora.lora.config import LoraConfig
from dlora.lora.variants import VARIANTS


def saved_lora(state: Mapping[str, Any]) -> LoraConfig | None:
    """The resolved adapter settings in a `state.json`; None in one that was written without.

    Raises:
        UsageError: they are not what a run writes.
    """
    if "adapter" not in state:
        return None
    try:
        settings = dict(state["adapter"])
        return VARIANTS[settings.pop("method", "lora")].settings(**settings)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise UsageError(f"state.json: adapter: invalid settings: {error}") from None


def scaled(lora: LoraConfig, state: Mapping[str, Any]) -> LoraConfig:
    """The settings with the scale that a run has lowered at its end (`forget.action: shrink`).

    Raises:
        UsageError: that is not what a run writes.
    """
    found = state.get("forget")
    share = found.get("scale") if isinstance(found, dict) else None
    if share is None:
        return lora
    if not isinstance(share, float) or not 0 < share <= 1:
        raise UsageError(f"state.json: forget: scale is {share!r}")
    alphas = {name: alpha * share for name, alpha in lora.alpha_pattern.items()}
    return replace(lora, lora_alpha=lora.lora_alpha * share, alpha_pattern=alphas)
