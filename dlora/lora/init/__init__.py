"""One initialisation, one file: every module here that defines one is found by itself.

`INITS` maps the value of `adapter.init_lora_weights` to the class.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator

from dlora.lora.init.base import Initialisation


def _found() -> Iterator[type[Initialisation]]:
    for module in pkgutil.iter_modules(__path__):
        content = vars(importlib.import_module(f"{__name__}.{module.name}"))
        for value in content.values():
            if isinstance(value, type) and issubclass(value, Initialisation):
                yield value


INITS: dict[str | bool, type[Initialisation]] = {
    kind.name: kind for kind in _found() if hasattr(kind, "name")
}

__all__ = ["INITS", "Initialisation"]
