"""One method, one file. `VARIANTS` maps the value of `adapter.method` to the adapter's class."""

from __future__ import annotations

from dlora.lora.variants.lora import LoraAdapter

VARIANTS = {"lora": LoraAdapter}

__all__ = ["VARIANTS", "LoraAdapter"]
