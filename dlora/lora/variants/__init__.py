"""One method, one file: every module here that defines an adapter is found by itself.

`VARIANTS` maps a variant's name to the adapter's class, and that has its settings. The name is the
value of `adapter.method`, or that of an option that changes the form (`LoraConfig.variant`).
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator

from dlora.lora.variants.lora import LoraAdapter, PlainLora


def _found() -> Iterator[type[LoraAdapter]]:
    for module in pkgutil.iter_modules(__path__):
        content = vars(importlib.import_module(f"{__name__}.{module.name}"))
        for value in content.values():
            if isinstance(value, type) and issubclass(value, LoraAdapter):
                yield value


VARIANTS: dict[str, type[LoraAdapter]] = {kind.name: kind for kind in _found()}

__all__ = ["VARIANTS", "LoraAdapter", "PlainLora"]
