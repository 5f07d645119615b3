"""A process in which dlora's kernels in Triton compute on the CPU, by Triton's interpreter.

The interpreter cuts a float32 off where Triton documents that it is rounded to the nearest bfloat16
(`tl.cast`), and makes other numbers of the smallest ones that it widens. torch casts in its place.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ranks import Pool


class Interpreter:
    """`interpreter(function, *args)`: what the function, at the top of a module, returns there."""

    def __init__(self, directory: Path) -> None:
        self._pool = Pool(1, directory, fresh=True)

    def __call__(self, function: Callable[..., Any], *args: Any) -> Any:
        return self._pool.run(_interpreted, function, args)[0]

    def close(self) -> None:
        self._pool.close()


def _interpreted(function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    if "triton" not in sys.modules:
        _choose()
    return function(*args)


def _choose() -> None:
    """Triton asks for the variable when it is imported."""
    os.environ["TRITON_INTERPRET"] = "1"
    import torch
    import triton.language as tl
    from triton.runtime import interpreter

    from dlora.quant import where_triton

    cast = interpreter.InterpreterBuilder.cast_impl

    def rounding(self: Any, source: Any, to: Any) -> Any:
        kinds = source.dtype.scalar, to.scalar
        if kinds == (tl.float32, tl.bfloat16):
            data = torch.tensor(source.data).bfloat16().view(torch.uint16).numpy()
        elif kinds == (tl.bfloat16, tl.float32):
            data = torch.tensor(source.data).view(torch.bfloat16).float().numpy()
        else:
            return cast(self, source, to)
        return interpreter.TensorHandle(data, to.scalar)

    interpreter.InterpreterBuilder.cast_impl = rounding
    where_triton._works = lambda device: True
