"""`state_dict()` of adapters: tensors that each have a storage of their own.

A replica lays all adapters end to end in one flat tensor, so that their parameters are views of one
storage. Savers of the safetensors family take views of one storage for tied weights and store one
of them. So a state dict has aliases: the same memory, described as a storage that is as large as
the tensor. What is loaded into one of its tensors is loaded into the adapter.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class OwnStorage(nn.Module):
    """A module whose state dict shows each of its tensors as one that shares no storage."""

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in () if keep_vars else (*self._parameters, *self._buffers):
            tensor = destination.get(prefix + name)
            if tensor is not None and is_part(tensor):
                destination[prefix + name] = torch.from_dlpack(tensor)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *args: Any
    ) -> None:
        """As torch's, but parts of a flat tensor are copied into, even with `assign=True`.

        The replica and its optimizer would train on with the parameters that were replaced.
        """
        if any(p is not None and is_part(p) for p in self._parameters.values()):
            local_metadata = {**local_metadata, "assign_to_params_buffers": False}
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)


def is_part(tensor: Tensor) -> bool:
    """Whether a plain tensor is a contiguous part of a larger storage."""
    if not isinstance(tensor, Tensor) or type(tensor) not in (Tensor, nn.Parameter):
        return False
    if tensor.is_meta or tensor.numel() == 0 or not tensor.is_contiguous():
        return False
    return tensor.untyped_storage().nbytes() > tensor.nbytes
