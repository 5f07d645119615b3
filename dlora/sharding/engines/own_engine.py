"""A DeepSpeed engine of the user's own, found before it interferes; DeepSpeed is not imported."""

from __future__ import annotations

import gc
import sys

from torch import nn

from dlora.errors import UsageError

OWN_OPTIMIZER = (
    "shard: this DeepSpeed engine has an optimizer section and would reduce, clip and step by "
    "itself; initialise the frozen base without one"
)


def check_engine(model: nn.Module) -> None:
    """Raise a `UsageError` about an engine over `model`, at any stage, with an optimizer section.

    It would reduce, clip and step by itself. At stage 3 its parameters say so; below it nothing in
    the model does, and the engine's hooks would fail or wait in the first backward pass.
    """
    if "deepspeed" not in sys.modules:
        return
    for found in gc.get_objects():
        if type(found).__name__ != "DeepSpeedEngine":
            continue
        if found.__dict__.get("_modules", {}).get("module") is not model:
            continue
        if found.__dict__.get("basic_optimizer") is not None:
            raise UsageError(OWN_OPTIMIZER)
