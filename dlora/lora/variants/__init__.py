"""One method, one file: a class with the members of `LoraAdapter`, found by its `name`.

`VARIANTS` maps a variant's name to the adapter's class, and that has its settings. The name is the
value of `adapter.method`, or that of an option that changes the form (`LoraConfig.variant`).
"""

from __future__ import annotations

from dlora.lora.variants.lora import LoraAdapter, PlainLora
from dlora.registry import Parts

VARIANTS: Parts[type[LoraAdapter]] = Parts("lora.variants")

__all__ = ["VARIANTS", "LoraAdapter", "PlainLora"]
