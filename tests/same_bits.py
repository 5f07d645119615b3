"""Tensors that have to be equal to the last bit."""

import torch
from torch import Tensor

_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def assert_same_bits(found: Tensor, wanted: Tensor) -> None:
    """Of floating-point tensors: type, layout, signs of zeros; of what is no number, that only."""
    assert found.dtype == wanted.dtype and found.shape == wanted.shape
    assert found.stride() == wanted.stride()
    bits, numbers = _BITS[wanted.dtype.itemsize], ~wanted.isnan()
    assert torch.equal(~found.isnan(), numbers)
    assert torch.equal(found[numbers].view(bits), wanted[numbers].view(bits))
