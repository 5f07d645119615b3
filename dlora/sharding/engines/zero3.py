"""ZeRO-3: W0 in flat partitions of stock DeepSpeed, gathered module by module; A and B outside.

Only two parts of DeepSpeed are at work: the partitioned parameter (`zero.Init`) and the hooks that
gather it when a module needs it (`DeepSpeedZeRoOffload`, what its engine makes of a model without
an optimizer). There is no DeepSpeed engine, so nothing else clips, casts or reduces;
gradients, clip, scores and optimizer are the replica's, as on every engine.

A and B stay outside by name: they are not among the module's parameters while DeepSpeed
partitions, and later they are in children that are never called, where it has no hooks.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dlora.errors import UsageError
from dlora.registry import option
from dlora.sharding.comm_bytes import WireCounter, ring_gather_bytes
from dlora.sharding.engines.gather_groups import (
    Group,
    block_lists,
    head_parameters,
    is_vector,
    module_groups,
)
from dlora.sharding.engines.hidden import hidden
from dlora.sharding.engines.own_engine import OWN_OPTIMIZER
from dlora.sharding.engines.protocol import Device, Weights
from dlora.sharding.engines.shard_loading import fill, slots_of
from dlora.sharding.topology import Placement, Topology

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # it would look for a driver otherwise
logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
# DeepSpeed calls torch by a deprecated name; a user can do nothing about that.
warnings.filterwarnings("ignore", ".*all_gather_into_tensor` is deprecated", FutureWarning)

import deepspeed  # noqa: E402
from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload  # noqa: E402
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus  # noqa: E402

PREFETCH = torch.cuda.is_available()
_SHM_OP = "deepspeed_shm_comm"
_NO_MODULE = -1  # DeepSpeed counts its modules from 0


class Zero3Options:
    """Where the shards of W0 are stored."""

    cpu_offload: bool = option(False, "store each rank's shard of W0 in host memory")


class Zero3:
    """Engine for `engine: zero3` with W0 over the ranks of a node or of the world."""

    name = "zero3"
    requires = {"deepspeed": "'dlora[zero3]'"}

    def __init__(self, placement: Placement, topology: Topology) -> None:
        self.placement, self.topology, self.wire = placement, topology, WireCounter()
        self._hooks: DeepSpeedZeRoOffload | None = None
        self._kept: set[Any] = set()  # for the step, where the others are freed
        self._resident: set[Any] = set()

    @classmethod
    def groups(cls, skeleton: nn.Module) -> list[Group]:
        """One group for each module with parameters of its own."""
        return module_groups(skeleton)

    def load(self, weights: Weights, device: torch.device) -> nn.Module:
        """Every rank reads its own elements of each parameter straight into its partition."""
        model, init = weights.empty(), self._init()

        def make_shard(meta: nn.Parameter) -> tuple[nn.Parameter, int, Tensor]:
            values = torch.empty(meta.shape, dtype=meta.dtype, device=device)
            parameter: Any = nn.Parameter(values, requires_grad=False)
            del values  # its pages are never touched, and it is gone before the next one
            _partition(init, parameter)
            return parameter, *_own_part(parameter)

        fill(slots_of(model), weights, make_shard)
        return model.to(device)

    def shard(self, model: nn.Module, ignored: Iterable[nn.Parameter], device: Device) -> None:
        """DeepSpeed's partitioning, which puts shards on this process's own device."""
        outside = set(ignored)
        base: list[Any] = [p for p in model.parameters() if p not in outside]
        if any(hasattr(parameter, "_z3_optimizer") for parameter in base):
            raise UsageError(OWN_OPTIMIZER)
        if not any(map(_is_partitioned, base)):
            init = self._init()
            for parameter in base:
                _partition(init, parameter)
        if hasattr(model, "ds_inflight_param_registry"):  # an engine of the user's own has hooks
            return
        with hidden(model, outside):
            self._hooks = DeepSpeedZeRoOffload(
                model,
                timers=None,
                ds_config=None,
                max_reuse_distance=0,  # free a weight when its module is done
                param_persistence_threshold=0,
                dp_process_group=base[0].ds_process_group,
                **_look_ahead(model),
            )
        hooks = self._hooks
        _gather_what_others_read(model)
        # DeepSpeed does not see the end of backward in a module whose input needs no gradient.
        model.register_forward_pre_hook(lambda *_: hooks.release_backward_leftovers())

    def after_load(self, model: nn.Module) -> None:
        partitioned = _partitioned(model.parameters())
        if self._hooks is not None:
            head = _partitioned(head_parameters(model))
            self._kept = {p for p in head if not is_vector(p.ds_shape)}
            for parameter in partitioned:
                _persist(parameter, is_vector(parameter.ds_shape) or parameter in self._kept)
        for parameter in partitioned:
            for name in ("all_gather", "all_gather_coalesced"):
                setattr(parameter, name, self._counted(getattr(parameter, name), parameter))

    def keep_gathered(self, model: nn.Module, paths: Collection[str]) -> None:
        for path in paths:
            module = model.get_submodule(path)
            for parameter in _partitioned(module.parameters(recurse=False)):
                _persist(parameter, True)
                self._resident.add(parameter)

    def release_gathered(self, model: nn.Module, paths: Collection[str]) -> None:
        for path in paths:
            for parameter in _partitioned(model.get_submodule(path).parameters(recurse=False)):
                self._resident.discard(parameter)
                _persist(parameter, is_vector(parameter.ds_shape) or parameter in self._kept)
        self.free_gathered(model)

    def set_trainable(self, model: nn.Module, trained: Iterable[nn.Parameter]) -> None:
        """Nothing to do: a module is gathered in backward only if a gradient reaches it."""

    def free_gathered(self, model: nn.Module) -> None:
        if self._hooks is not None:
            self._hooks.release_backward_leftovers()
        for parameter in _partitioned(model.parameters()):
            stays = parameter.ds_persist and parameter not in self._kept - self._resident
            if parameter.ds_status is ZeroParamStatus.AVAILABLE and not stays:
                parameter.ds_active_sub_modules.clear()
                parameter.partition()
                _persist(parameter, parameter.ds_persist)

    @contextmanager
    def staying(self, model: nn.Module) -> Iterator[None]:
        freed = [p for p in _partitioned(model.parameters()) if not p.ds_persist]
        try:
            for parameter in freed:
                _persist(parameter, True)
            yield
        finally:
            for parameter in freed:
                _persist(parameter, False)
            self.free_gathered(model)

    @contextmanager
    def gather_module(self, module: nn.Module) -> Iterator[dict[str, Tensor]]:
        absent = [
            p
            for p in _partitioned(module.parameters())
            if p.ds_status is not ZeroParamStatus.AVAILABLE
        ]
        with _leaving(absent), deepspeed.zero.GatheredParameters(absent):
            yield {path: parameter.detach() for path, parameter in module.named_parameters()}

    def _init(self) -> Any:
        if not deepspeed.comm.is_initialized():
            deepspeed.ops.__compatible_ops__[_SHM_OP] = False  # it would call a compiler
            deepspeed.init_distributed(dist_init_required=False)
        return deepspeed.zero.Init(
            data_parallel_group=_shard_group(self.placement),
            mem_efficient_linear=False,
            remote_device="cpu" if self.placement.offload else None,
            pin_memory=self.placement.offload and torch.cuda.is_available(),
        )

    def _counted(self, gather: Callable[..., Any], own: Any) -> Callable[..., Any]:
        """DeepSpeed's own gather of a list of parameters, by default of `own`, counted."""

        def counting(*args: Any, **kwargs: Any) -> Any:
            listed = args[0] if args else kwargs.get("param_list") or [own]
            for parameter in listed:
                if parameter.ds_status is ZeroParamStatus.NOT_AVAILABLE:
                    ranks = parameter.ds_zero_partition_world_size
                    self.wire.add(ring_gather_bytes(parameter.ds_tensor.nbytes * ranks, ranks))
            return gather(*args, **kwargs)

        return counting


def _shard_group(placement: Placement) -> dist.ProcessGroup | None:
    if placement.replicas == 1:
        return dist.group.WORLD
    size = placement.shard_size
    groups = [[k * size + i for i in range(size)] for k in range(placement.replicas)]
    return dist.new_subgroups_by_enumeration(groups)[0]


def _own_part(parameter: Any) -> tuple[int, Tensor]:
    """Where this rank's part begins, and its elements, without padding."""
    part = parameter.ds_tensor
    start = part.ds_numel * dist.get_rank(parameter.ds_process_group)
    stop = min(start + part.ds_numel, parameter.ds_numel)
    return start, part[: max(stop - start, 0)]


def _partition(init: Any, parameter: Any) -> None:
    """Make a whole parameter a partitioned one. No broadcast: every rank has the same values."""
    init._convert_to_deepspeed_param(parameter)
    parameter.partition()


def _gather_what_others_read(model: nn.Module) -> None:
    """Gather a weight that another module reads past its owner's forward (Mamba's convolution).

    DeepSpeed's engine switches its own search for such weights on while its model's forward runs.
    It notes who reads a weight, so that backward gathers it there too.
    """
    tables: list[Any] = [module._parameters for module in model.modules()]
    tables = [table for table in tables if hasattr(table, "_in_forward")]

    def switch(on: bool) -> None:
        for table in tables:
            table._in_forward = on

    model.register_forward_pre_hook(lambda *_: switch(True))
    model.register_forward_hook(lambda *_: switch(False), always_call=True)


def _look_ahead(model: nn.Module) -> dict[str, int]:
    """How far DeepSpeed gathers ahead: by the largest module of the blocks.

    Not at all where gathering and computing use the same cores. Elsewhere weights that are still
    gathered when backward begins are not gathered again, so that less is sent than planned.
    """
    if not PREFETCH:
        return {"prefetch_bucket_size": 0}
    blocks = [model.get_submodule(path) for path in block_lists(model)] or [model]
    sizes = [
        sum(p.ds_numel for p in _partitioned(module.parameters(recurse=False)))
        for block in blocks
        for module in block.modules()
    ]
    head = sum(p.ds_numel for p in head_parameters(model))
    return {"prefetch_bucket_size": max(sizes), "max_live_parameters": 2 * max(sizes) + head}


def _persist(parameter: Any, stays: bool) -> None:
    """Let a gathered parameter stay when its module is done, or go.

    DeepSpeed forgets `ds_persist` while a pass is not like the one before, as where passes with and
    without a gradient alternate. What is in use by a module stays; this one never ends.
    """
    parameter.ds_persist = stays
    users = parameter.ds_active_sub_modules
    users.add(_NO_MODULE) if stays else users.discard(_NO_MODULE)


@contextmanager
def _leaving(parameters: list[Any]) -> Iterator[None]:
    """Inside, parameters that stay otherwise may be freed."""
    users = [parameter.ds_active_sub_modules for parameter in parameters]
    staying = [own for own in users if _NO_MODULE in own]
    for own in staying:
        own.discard(_NO_MODULE)
    try:
        yield
    finally:
        for own in staying:
            own.add(_NO_MODULE)


def _is_partitioned(parameter: nn.Parameter) -> bool:
    return hasattr(parameter, "ds_id")


def _partitioned(parameters: Iterable[nn.Parameter]) -> list[Any]:
    return [parameter for parameter in parameters if _is_partitioned(parameter)]
