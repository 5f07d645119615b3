"""What a checkpoint's `state.json` records of the adapter."""

from __future__ import annotations

from collections.abc import Mapping
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
