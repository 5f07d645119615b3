"""CUDA tensors without a GPU: they have shapes, dtypes and devices, and no data."""

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

CUDA = torch.device("cuda", 0)


def _copied(tensor: Any, source: Any, non_blocking: bool = False) -> Any:
    return torch.ops.aten.copy_.default(tensor, source, non_blocking)


def _picked(tensor: Any, index: Any) -> Any:
    """`tensor[index]` of slices."""
    for dim, part in enumerate(index if isinstance(index, tuple) else (index,)):
        assert isinstance(part, slice)
        tensor = torch.ops.aten.slice.Tensor(tensor, dim, part.start, part.stop, part.step or 1)
    return tensor


@contextlib.contextmanager
def fake_cuda() -> Iterator[torch.device]:
    """Inside, tensors that are made on the device that this yields are fake."""
    with pytest.MonkeyPatch.context() as patch, FakeTensorMode(allow_non_fake_inputs=True):
        # torch's own ask a CPU-only build for a CUDA device first.
        patch.setattr(FakeTensor, "__getitem__", _picked, raising=False)
        patch.setattr(FakeTensor, "copy_", _copied, raising=False)
        yield CUDA
