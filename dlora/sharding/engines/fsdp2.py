"""FSDP2: W0 in row shards (`fully_shard`), gathered block by block; A and B stay outside.

Since W0 is frozen FSDP2 issues no reduce-scatter: its only collectives are the gathers, which this
engine counts through FSDP2's own communication hook.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultAllGather
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from dlora.sharding.comm_bytes import WireCounter, ring_gather_bytes
from dlora.sharding.engines.gather_groups import (
    FREE,
    KEEP,
    Group,
    block_lists,
    groups_of,
    sharding_plan,
    sharing_blocks,
)
from dlora.sharding.engines.protocol import Device, Weights
from dlora.sharding.engines.shard_loading import fill, slots_of
from dlora.sharding.engines.storage import own_storage
from dlora.sharding.topology import Placement, Topology


class Fsdp2:
    """Engine for `engine: fsdp2` with W0 over the ranks of a node or of the world."""

    name = "fsdp2"

    def __init__(self, placement: Placement, topology: Topology) -> None:
        self.placement, self.topology, self.wire = placement, topology, WireCounter()
        self._resident: set[nn.Module] = set()
        # Of each unit: whether it stays after forward anyway, and whether for all of a step.
        self._before: dict[Any, tuple[bool, bool]] = {}

    @classmethod
    def groups(cls, skeleton: nn.Module) -> list[Group]:
        """Those of transformers' plan, or of the `fully_shard` units that a sharded model has."""
        units = {p: m for p, m in skeleton.named_modules() if p and isinstance(m, FSDPModule)}
        rules = {p: KEEP if _stays_for_step(m) else FREE for p, m in units.items()}
        return groups_of(skeleton, rules or sharding_plan(skeleton))

    def load(self, weights: Weights, device: torch.device) -> nn.Module:
        """transformers shards while it reads, by the plan that `sharding_plan` completes.

        A base that is read element by element, or whose rows transformers would mix, is sharded
        here into the same units, and every rank reads its own rows.
        """
        if weights.element_wise or weights.makes_rows:
            return self._load_rows(weights, device)
        return weights.from_pretrained(
            distributed_config={
                "fsdp_size": self.placement.shard_size,
                "dp_replicate_size": self.placement.replicas,
                "fsdp_plan": sharding_plan(weights.skeleton),
            }
        )

    def shard(self, model: nn.Module, ignored: Iterable[nn.Parameter], device: Device) -> None:
        """`fully_shard` each block of every list of blocks, then the root with the rest.

        Blocks that share parameters are one unit, as FSDP2 wants it.
        """
        if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
            return
        kind = (device or next(model.parameters()).device).type  # where `fully_shard` moves shards
        mesh, outside = self._mesh(kind), set(ignored)
        for blocks in sharing_blocks(model):
            fully_shard(blocks, mesh=mesh, ignored_params=outside, reshard_after_forward=True)
        fully_shard(model, mesh=mesh, ignored_params=outside)

    def after_load(self, model: nn.Module) -> None:
        own_storage(model)
        _gather_tied_once(model)
        counting = _CountingAllGather(self.wire)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_custom_all_gather(counting)
                if module is model or _stays_after_forward(module):  # for all passes of a step
                    module.set_reshard_after_backward(False, recurse=False)
        for group in self.groups(model):
            unit = model.get_submodule(group.path)
            if group.waits and isinstance(unit, FSDPModule):  # else the root alone is sharded
                unit.set_reshard_after_forward(False, recurse=False)
        if gathers_run_beside(model):
            prefetch_blocks(model)
        _gather_ahead(model)

    def set_trainable(self, model: nn.Module, trained: Iterable[nn.Parameter]) -> None:
        """End backward's look-ahead at the first unit that is trained.

        FSDP2 gathers the unit before the current one ahead of time, also where no gradient goes: an
        embedding in front of the first block would be gathered a second time for nothing.
        """
        wanted = set(trained)
        for module in model.modules():
            if module is model or not isinstance(module, FSDPModule):
                continue
            if any(parameter in wanted for parameter in module.parameters()):
                module.set_modules_to_backward_prefetch([module])  # which is gathered already
                return

    def keep_gathered(self, model: nn.Module, paths: Collection[str]) -> None:
        for path in paths:
            unit: Any = model.get_submodule(path)
            before = _stays_after_forward(unit), _stays_for_step(unit)
            if unit is model:  # which FSDP2 itself keeps, from the first forward on
                before = True, True
            self._before.setdefault(unit._get_fsdp_state(), before)
            self._resident.add(unit)
            unit.set_reshard_after_forward(False, recurse=False)
            unit.set_reshard_after_backward(False, recurse=False)

    def release_gathered(self, model: nn.Module, paths: Collection[str]) -> None:
        for path in paths:
            unit: Any = model.get_submodule(path)
            self._resident.discard(unit)
            after_forward, for_step = self._before[unit._get_fsdp_state()]
            unit.set_reshard_after_forward(not after_forward, recurse=False)
            unit.set_reshard_after_backward(not for_step, recurse=False)
            unit.reshard()

    def free_gathered(self, model: nn.Module) -> None:
        for module in model.modules():
            if isinstance(module, FSDPModule) and module not in self._resident:
                module.reshard()

    @contextmanager
    def staying(self, model: nn.Module) -> Iterator[None]:
        units = [m for m in model.modules() if isinstance(m, FSDPModule) and m is not model]
        freed = [unit for unit in units if not _stays_after_forward(unit)]
        try:
            for unit in freed:
                unit.set_reshard_after_forward(False, recurse=False)
            yield
        finally:
            for unit in freed:
                unit.set_reshard_after_forward(True, recurse=False)
            self.free_gathered(model)

    @contextmanager
    def gather_module(self, module: nn.Module) -> Iterator[dict[str, Tensor]]:
        yield {
            path: parameter.full_tensor() if isinstance(parameter, DTensor) else parameter.detach()
            for path, parameter in module.named_parameters()
        }

    def _load_rows(self, weights: Weights, device: torch.device) -> nn.Module:
        model, mesh = weights.empty(), self._mesh(device.type)
        slots, units = slots_of(model), self.groups(model)
        for unit in sorted(units, key=lambda group: -len(group.path.split("."))):
            if unit.path:  # inner ones first, and the root last
                inner = model.get_submodule(unit.path)
                fully_shard(inner, mesh=mesh, reshard_after_forward=unit.freed)
        fully_shard(model, mesh=mesh)
        fill(slots, weights, lambda meta: _own_rows(meta, device))
        return model.to(device)

    def _mesh(self, device: str) -> DeviceMesh:
        size, replicas = self.placement.shard_size, self.placement.replicas
        if replicas == 1:
            return init_device_mesh(device, (size,), mesh_dim_names=("shard",))
        return init_device_mesh(device, (replicas, size), mesh_dim_names=("replicate", "shard"))


def _own_rows(meta: Any, device: torch.device) -> tuple[nn.Parameter, int, Tensor]:
    """What `fill` wants for a sharded parameter on the meta device: this rank's rows."""
    mesh, placements, shape = meta.device_mesh, meta.placements, meta.shape
    local, offset = compute_local_shape_and_global_offset(shape, mesh, placements)
    rows = torch.empty(local, dtype=meta.dtype, device=device)
    sharded = DTensor.from_local(
        rows, mesh, placements, run_check=False, shape=shape, stride=meta.stride()
    )
    start = offset[0] * math.prod(shape[1:])
    return nn.Parameter(sharded, requires_grad=False), start, rows.view(-1)


def _stays_after_forward(unit: FSDPModule) -> bool:
    groups = unit._get_fsdp_state()._fsdp_param_groups
    return all(group.post_forward_mesh_info is None for group in groups)


def _stays_for_step(unit: FSDPModule) -> bool:
    """And not only from forward to backward."""
    groups = unit._get_fsdp_state()._fsdp_param_groups
    freed = any(group.reshard_after_backward for group in groups)
    return _stays_after_forward(unit) and not freed


def gathers_run_beside(model: nn.Module) -> bool:
    """Whether a gather runs beside computation: on a GPU, on a stream of its own."""
    return next(model.parameters()).is_cuda


def prefetch_blocks(model: nn.Module) -> None:
    """Let each block ask for the next one before it computes.

    On a GPU that takes no more memory, as the next one arrives during the computation anyway; the
    host, if it is behind, no longer delays the gather. On a CPU, where a gather has ended when it
    returns, it would take another block's memory for nothing.
    """
    for path in block_lists(model):
        units = [m for m in model.get_submodule(path).children() if isinstance(m, FSDPModule)]
        for unit, following in itertools.pairwise(units):
            unit.set_modules_to_forward_prefetch([following])


def _gather_ahead(model: nn.Module) -> None:
    """Let gathers wait for the last change of W0, and not for all that was enqueued before them.

    FSDP2 waits for the optimizer at the start of each forward, and so for all of the last backward:
    it supposes that the optimizer changes what is gathered. It takes an event for one forward.
    """
    if not isinstance(model, FSDPModule):
        return
    states = [m._get_fsdp_state() for m in model.modules() if isinstance(m, FSDPModule)]
    managed = [p for s in states for g in s._fsdp_param_groups for p in g.fsdp_params]
    handle: Any = torch.get_device_module(states[0]._device)
    changed: list[Any] = [None, None]  # versions of the shards, and the event of their change

    def before(module: Any, *_: Any) -> None:
        versions = [param._sharded_param_data._version for param in managed]
        if versions != changed[0]:
            changed[:] = versions, handle.Event()
            changed[1].record()
        module.set_post_optim_event(changed[1])

    model.register_forward_pre_hook(before, prepend=True)


def _gather_tied_once(model: nn.Module) -> None:
    """Let the root alone gather a weight that it shares with other units.

    transformers shards a model before it ties its weights, and so FSDP2 would gather a tied weight
    once for the embedding and once for the head. The root's weights stay gathered during a pass.
    """
    if not isinstance(model, FSDPModule):
        return
    units = [module for module in model.modules() if isinstance(module, FSDPModule)]
    root, *inner = dict.fromkeys(unit._get_fsdp_state() for unit in units)
    owners: dict[nn.Parameter, Any] = {}
    for state in (root, *inner):
        for group in list(state._fsdp_param_groups):
            for managed in list(group.fsdp_params):
                info = managed._module_info
                weight = getattr(info.module, info.param_name)
                if state is root and weight not in owners:
                    owners[weight] = managed
                elif weight in owners:
                    owners[weight]._module_info.shared_modules.append(info.module)
                    owners[weight]._module_info.shared_param_names.append(info.param_name)
                    group.fsdp_params.remove(managed)
            if not group.fsdp_params:
                state._fsdp_param_groups.remove(group)


class _CountingAllGather(DefaultAllGather):
    """FSDP2's own gather, counted."""

    def __init__(self, wire: WireCounter) -> None:
        super().__init__()
        self._wire = wire

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        async_op: bool = False,
    ) -> dist.Work | None:
        self._wire.add(ring_gather_bytes(output_tensor.nbytes, group.size()))
        return super().__call__(output_tensor, input_tensor, group, async_op)
