"""The usual start: A Kaiming-uniform, B zero, as PEFT's `init_lora_weights=True`."""

from __future__ import annotations

from dlora.lora.init.base import Initialisation


class Kaiming(Initialisation):
    """A ~ U(−1/√n, 1/√n), B = 0."""

    name = True
