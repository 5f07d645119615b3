"""`train.deterministic`: kernels that give the same bits from run to run on a GPU too.

Without it some of CUDA's add in the order in which threads arrive (attention's backward, gradients
of a look-up), so that two runs, or a run and its continuation, differ in the last bits.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from dlora.errors import UsageError

# Read when cuBLAS starts, and by transformers where it calls flash-attn.
_ENVIRONMENT = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "FLASH_ATTENTION_DETERMINISTIC": "1"}
_REFUSED = "does not have a deterministic implementation"  # in torch's error


def set_environment(wanted: bool) -> None:
    """Set what cuBLAS reads at its first product, if strict kernels are wanted."""
    for name, value in _ENVIRONMENT.items() if wanted else ():
        os.environ.setdefault(name, value)


@contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Inside, torch takes strict kernels, if that is wanted; begin before the GPU is used.

    Raises:
        UsageError: an operator of the model has none.
    """
    if not wanted:
        yield
        return
    set_environment(wanted)
    settings: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    settings.fill_uninitialized_memory = False  # nothing reads it
    try:
        yield
    except RuntimeError as error:
        if _REFUSED not in str(error):
            raise
        operator = str(error).partition(_REFUSED)[0].strip()
        raise UsageError(
            f"train.deterministic: {operator} has no deterministic kernel; another "
            "model.attn_implementation may do without it, or set train.deterministic: false"
        ) from error
    finally:
        torch.use_deterministic_algorithms(before[0])
        settings.fill_uninitialized_memory = before[1]
