"""What an engine is, and which there are. An engine shards and gathers W0, and nothing else.

A new engine is one file of this folder: a class with these members. `dlora.registry` finds it.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable
from contextlib import AbstractContextManager
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from dlora.errors import UsageError
from dlora.registry import room
from dlora.sharding.comm_bytes import WireCounter
from dlora.sharding.engines.gather_groups import Group
from dlora.sharding.topology import Placement, Topology

Device = torch.device | None  # where W0 comes to lie; None: where it is


class Weights(Protocol):
    """The stored weights of a base, which are read as whole modules or as single elements.

    Attributes:
        skeleton: the model on the meta device.
        element_wise: whether `empty` and `read` must be used, since only they know the format.
        makes_rows: whether an engine that divides by rows must use them.
    """

    skeleton: nn.Module
    element_wise: bool

    @property
    def makes_rows(self) -> bool:
        """See above."""

    def from_pretrained(self, **sharding: Any) -> nn.Module:
        """The model as transformers' `from_pretrained` reads it with these arguments."""

    def empty(self) -> nn.Module:
        """The model with its buffers in place and its parameters, frozen, on the meta device."""

    def read(self, name: str, start: int, out: Tensor) -> None:
        """Fill `out` [n] with the elements from `start` on of the flattened parameter `name`."""


class Engine(Protocol):
    """Distributes a frozen base over ranks.

    Every rank calls the members in the same order: `load` or `shard`, `after_load`,
    `set_trainable`, `keep_gathered`; then `free_gathered` between steps.

    Attributes:
        wire: counts the bytes that this rank's collectives send.
    """

    name: ClassVar[str]  # the value of `sharding.engine`
    placement: Placement
    topology: Topology
    wire: WireCounter

    def __init__(self, placement: Placement, topology: Topology) -> None: ...

    @classmethod
    def groups(cls, skeleton: nn.Module) -> list[Group]:
        """The parameters that are gathered together, in the order of the model: for the plan.

        Args:
            skeleton: the model on the meta device.
        """

    def load(self, weights: Weights, device: torch.device) -> nn.Module:
        """The model with this rank's shard of every parameter; no rank reads more than it needs."""

    def shard(self, model: nn.Module, ignored: Iterable[nn.Parameter], device: Device) -> None:
        """Shard the parameters of `model` in place, all but `ignored`.

        A base that is sharded already stays as it is.
        """

    def after_load(self, model: nn.Module) -> None:
        """Prepare a sharded model: its shards own their storage, and its gathers are counted."""

    def set_trainable(self, model: nn.Module, trained: Iterable[nn.Parameter]) -> None:
        """Note what is trained: backward needs no weight in front of the first trained module."""

    def keep_gathered(self, model: nn.Module, paths: Collection[str]) -> None:
        """Make the groups at `paths` resident: they stay gathered after their first use."""

    def release_gathered(self, model: nn.Module, paths: Collection[str]) -> None:
        """Undo `keep_gathered` of the groups at `paths`, between steps, and free them."""

    def free_gathered(self, model: nn.Module) -> None:
        """Between steps: free the weights that passes left gathered, all but resident ones."""

    def staying(self, model: nn.Module) -> AbstractContextManager[None]:
        """While open, what a pass gathers stays gathered for the next pass; then it is freed.

        For passes without backward, as many as memory has room for all of W0.
        """

    def gather_module(self, module: nn.Module) -> AbstractContextManager[dict[str, Tensor]]:
        """The whole parameters of one module by path, while the context is open."""


def engine_class(placement: Placement, sharded: str | None = None) -> type[Engine]:
    """The engine of a placement; `replicated` where W0 is not divided at all.

    Args:
        sharded: the engine that divided the base already, if one did.

    Raises:
        UsageError: there is no such engine, or a package that it needs is not installed.
    """
    engines = room("sharding.engines")
    if placement.engine not in engines:  # also where one process needs none
        known = ", ".join(map(str, engines))
        raise UsageError(f"sharding.engine: expected one of {known}, got {placement.engine!r}")
    name = sharded or ("replicated" if placement.shard_size == 1 else placement.engine)
    return engines[name].load()


def build_engine(placement: Placement, topology: Topology, sharded: str | None = None) -> Engine:
    """An engine of `engine_class`; collective where it makes process groups."""
    return engine_class(placement, sharded)(placement, topology)


def sharded_by(model: nn.Module) -> str | None:
    """The engine that divided the model's parameters, or None where they are whole.

    Raises:
        UsageError: it was FSDP1, whose flat parameters mix what is frozen with what is trained.
    """
    if any(
        _is(module, "torch.distributed.fsdp", "FullyShardedDataParallel")
        for module in model.modules()
    ):
        raise UsageError(
            "shard: this model is wrapped by FSDP1 (FullyShardedDataParallel); give dlora the bare "
            "model, or one sharded by fully_shard"
        )
    parameters = list(model.parameters())
    if any(hasattr(parameter, "ds_id") for parameter in parameters):
        return "zero3"
    return "fsdp2" if any(map(is_divided, parameters)) else None


def is_divided(parameter: nn.Parameter) -> bool:
    """Whether this rank stores only a part of the parameter."""
    return _is(parameter, "torch.distributed.tensor", "DTensor") or hasattr(parameter, "ds_id")


def _is(value: object, module: str, name: str) -> bool:
    """`isinstance` without an expensive import: such an object exists only if its module is
    imported.
    """
    kind = getattr(sys.modules.get(module), name, None)
    return kind is not None and isinstance(value, kind)
