"""Adapters of PEFT's in a model that `attach` is given: known by their class.

PEFT is not imported.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

from dlora.errors import UsageError

_PACKAGE = "peft"


def check_none_of_peft(model: nn.Module) -> None:
    """Raise a `UsageError` if PEFT has wrapped the model."""
    for path, module in model.named_modules():
        if any(base.__module__.partition(".")[0] == _PACKAGE for base in type(module).__mro__):
            raise UsageError(
                f"attach: {path or 'the model'} is a {type(module).__name__} of PEFT's, whose "
                "adapters would no longer be trained; attach to the base itself (unload() returns "
                "it), and dlora.load_adapter reads an adapter that PEFT saved"
            )


def peft_asks() -> bool:
    """Whether a tuner of PEFT's looks for `peft_config`, before it puts its layers in."""
    frame: Any = sys._getframe(2)
    for _ in range(6):  # torch's and PEFT's own `__getattr__` lie between
        if frame is None:
            return False
        if frame.f_globals.get("__name__", "").startswith("peft.tuners"):
            return True
        frame = frame.f_back
    return False
