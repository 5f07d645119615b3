"""Numbers of tokens as callers have them: ints, NumPy's or torch's integers, whole floats."""

from __future__ import annotations

import math

from torch import Tensor

from dlora.errors import UsageError


def whole_number(tokens: int | Tensor) -> int:
    """`tokens` as an int.

    Raises:
        UsageError: it is a fraction, negative, no number, or several.
    """
    if isinstance(tokens, Tensor) and tokens.numel() != 1:
        raise UsageError(f"tokens: must be one number, not a tensor of {tokens.numel()}")
    try:
        value = float(tokens)
    except (TypeError, ValueError):
        value = math.nan
    if not 0 <= value < math.inf or value != int(value):
        raise UsageError(f"tokens: must be a whole number of target tokens, not {tokens}")
    return int(tokens)
