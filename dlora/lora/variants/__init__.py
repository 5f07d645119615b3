"""One method, one file. `VARIANTS` maps the value of `adapter.method` to the module that builds it."""

from __future__ import annotations

from dlora.lora.variants.lora import LoraAdapter

VARIANTS = {"lora": LoraAdapter}

__all__ = ["VARIANTS", "LoraAdapter"]
