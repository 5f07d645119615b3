"""After loading: every shard owns its memory, and no checkpoint file stays mapped.

A loader that slices a memory-mapped checkpoint leaves views: a shard of 1/N keeps the whole file
mapped.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor


@torch.no_grad()
def own_storage(model: nn.Module) -> None:
    """Copy every parameter and buffer that is a view of something larger or of a mapped file."""
    copies: dict[int, nn.Parameter] = {}  # tied parameters stay tied
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if hasattr(parameter, "ds_tensor"):
                continue  # DeepSpeed's partitions are memory of their own
            if id(parameter) not in copies:
                copies[id(parameter)] = _owning(parameter)
            if copies[id(parameter)] is not parameter:
                module.register_parameter(name, copies[id(parameter)])
        for name, buffer in module.named_buffers(recurse=False):
            if not _owns(buffer):
                module._buffers[name] = buffer.clone()


def held_bytes(model: nn.Module) -> int:
    """Bytes of the distinct storages on this rank of the frozen parameters of `model`."""
    storages = {}
    for shard in _shards_of_gathered(model):
        storages[shard.untyped_storage().data_ptr()] = shard.untyped_storage().nbytes()
    for parameter in model.parameters():
        if not parameter.requires_grad:
            # A partitioned parameter that stays gathered is there in part and as a whole.
            gathered = [parameter] if hasattr(parameter, "ds_tensor") else []
            for part in (_local(parameter), *gathered):
                storage = part.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def _shards_of_gathered(model: nn.Module) -> Iterator[Tensor]:
    """FSDP2's parts of its parameters, which the model does not show while they are gathered."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            for group in module._get_fsdp_state()._fsdp_param_groups:
                if group.is_unsharded:
                    yield from (managed._sharded_param_data for managed in group.fsdp_params)


def _local(tensor: Tensor) -> Tensor:
    """This rank's part: a DTensor's shard, a partitioned parameter's part, or all."""
    if isinstance(tensor, DTensor):
        return tensor.to_local()
    return getattr(tensor, "ds_tensor", tensor).detach()


def _owns(tensor: Tensor) -> bool:
    """Owns exactly its elements. A mapped file's storage has a file name, or is larger."""
    local = _local(tensor)
    storage = local.untyped_storage()
    if local.device.type != "cpu" or local.numel() == 0:
        return True
    mapped = not storage.resizable() or storage.filename is not None
    return storage.nbytes() == local.numel() * local.element_size() and not mapped


def _owning(parameter: nn.Parameter) -> nn.Parameter:
    if _owns(parameter):
        return parameter
    owned: Tensor = _local(parameter).clone(memory_format=torch.contiguous_format)
    if isinstance(parameter, DTensor):
        owned = DTensor.from_local(
            owned,
            parameter.device_mesh,
            parameter.placements,
            shape=parameter.shape,
            stride=parameter.stride(),
            run_check=False,
        )
    return nn.Parameter(owned, requires_grad=parameter.requires_grad)
