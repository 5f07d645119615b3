"""Adapters that a model has already when `attach` is given it: dlora's, or PEFT's.

The latter are known by their class; PEFT is not imported.
"""

from __future__ import annotations

from torch import nn

from dlora.errors import UsageError

_PACKAGE = "peft"


def check_no_adapters(model: nn.Module) -> None:
    """Raise a `UsageError` if `attach` was called already, or PEFT has wrapped the model."""
    if hasattr(model, "dlora"):
        raise UsageError("attach: this model already has adapters")
    for path, module in model.named_modules():
        if any(base.__module__.partition(".")[0] == _PACKAGE for base in type(module).__mro__):
            raise UsageError(
                f"attach: {path or 'the model'} is a {type(module).__name__} of PEFT's, whose "
                "adapters would no longer be trained; attach to the base itself (unload() returns "
                "it), and dlora.load_adapter reads an adapter that PEFT saved"
            )
