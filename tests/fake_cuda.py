"""CUDA tensors without a GPU: they have shapes, dtypes and devices, and no data."""

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

CUDA = torch.device("cuda", 0)


def _copied(tensor: Any, source: Any, non_blocking: bool = False) -> Any:
    return torch.ops.aten.copy_.default(tensor, source, non_blocking)


def _picked(tensor: Any, index: Any) -> Any:
    """`tensor[index]` of slices, numbers and None."""
    dim = 0
    for part in index if isinstance(index, tuple) else (index,):
        if part is None:
            tensor = torch.ops.aten.unsqueeze.default(tensor, dim)
        elif isinstance(part, int):
            tensor = torch.ops.aten.select.int(tensor, dim, part)
            continue
        else:
            assert isinstance(part, slice)
            tensor = torch.ops.aten.slice.Tensor(tensor, dim, part.start, part.stop, part.step or 1)
        dim += 1
    return tensor


def _contiguous(tensor: Any) -> Any:
    if tensor.is_contiguous():
        return tensor
    contiguous = torch.contiguous_format
    return torch.ops.aten.clone.default(tensor, memory_format=contiguous)


def _put(tensor: Any, index: Any, value: Any) -> None:
    """`tensor[index] = value`."""
    _picked(tensor, index).copy_(value)


@contextlib.contextmanager
def fake_cuda() -> Iterator[torch.device]:
    """Inside, tensors that are made on the device that this yields are fake."""
    with pytest.MonkeyPatch.context() as patch, FakeTensorMode(allow_non_fake_inputs=True):
        # torch's own ask a CPU-only build for a CUDA device first.
        patch.setattr(FakeTensor, "__getitem__", _picked, raising=False)
        patch.setattr(FakeTensor, "__setitem__", _put, raising=False)
        patch.setattr(FakeTensor, "contiguous", _contiguous, raising=False)
        patch.setattr(FakeTensor, "copy_", _copied, raising=False)
        yield CUDA


class HostWork(TorchDispatchMode):
    """Inside, `calls` has the operators that compute on the host, or copy to it; what is copied
    from there to a device, and views, are left out.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        outputs = made if isinstance(made, (list, tuple)) else [made]
        found = [out for out in outputs if isinstance(out, torch.Tensor)]
        if any(out.device.type == "cpu" for out in found) and not func.is_view:
            self.calls.append(str(func))
        return made
