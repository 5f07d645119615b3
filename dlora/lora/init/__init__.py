"""One initialisation, one file: a subclass of `Initialisation`, found by its `name`.

`INITS` maps the value of `adapter.init_lora_weights` to the class.
"""

from __future__ import annotations

from dlora.lora.init.base import Initialisation
from dlora.registry import Parts

INITS: Parts[type[Initialisation]] = Parts("lora.init")

__all__ = ["INITS", "Initialisation"]
