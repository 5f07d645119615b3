"""Where kernels written in Triton compute, each in place of several operators of torch.

They give the bits of torch's operators, which compute everywhere else: on a CPU, on a GPU for which
Triton makes no kernels, where it or the C compiler that it needs is not installed, and wherever
somebody looks at the operators: in graphs of torch's compiler, on tensors without data, under modes
that count or trace.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import warnings

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

_PLAIN = (Tensor, torch.nn.Parameter)
_CAPABILITY = (8, 0)  # what Triton supports


def in_triton(*tensors: Tensor) -> bool:
    """Whether Triton's kernels compute on these tensors, which lie on one device."""
    if torch.compiler.is_compiling() or is_in_torch_dispatch_mode():
        return False
    return all(type(tensor) in _PLAIN for tensor in tensors) and _works(tensors[0].device)


@functools.cache
def _works(device: torch.device) -> bool:
    """Whether a kernel can be made and started on a device; the first call of a process tries it.

    Not in Triton's interpreter, which is slow and cuts numbers off where it has to round them.
    """
    interprets = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")
    if device.type != "cuda" or interprets or torch.version.hip is not None:
        return False
    if importlib.util.find_spec("triton") is None:
        return False
    if torch.cuda.get_device_capability(device) < _CAPABILITY:
        return False
    try:
        from dlora.quant import triton_unpack

        one = torch.ones(1, 4, dtype=torch.uint8, device=device)
        triton_unpack.int8(one, one, torch.float32)
    except Exception as error:  # whatever Triton raises without a compiler, or where it is too old
        warnings.warn(
            f"Triton does not work on {device}, torch computes in its place: {error}", stacklevel=2
        )
        return False
    return True
