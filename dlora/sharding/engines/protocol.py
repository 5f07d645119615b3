"""What an engine is, and which there are. An engine decides where W0 lives, and nothing else.

A new engine is one file of this folder: a class with these members. `dlora.registry` finds it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from contextlib import AbstractContextManager
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor

from dlora.errors import UsageError
from dlora.registry import room
from dlora.sharding.comm_bytes import WireCounter
from dlora.sharding.engines.gather_groups import Group
from dlora.sharding.topology import Placement, Topology


class Weights(Protocol):
    """Where a base comes from: whole modules, or single elements."""

    skeleton: nn.Module  # the model on the meta device
    element_wise: bool  # `empty` and `read` alone know how the model is stored

    def from_pretrained(self, **sharding: Any) -> nn.Module:
        """What transformers' `from_pretrained` makes of the base and these arguments."""

    def empty(self) -> nn.Module:
        """The model with its buffers in place and its parameters, frozen, on the meta device."""

    def read(self, name: str, start: int, out: Tensor) -> None:
        """Fill `out` [n] with the elements from `start` on of the flattened parameter `name`."""


class Engine(Protocol):
    """Places a frozen base over ranks. All members are called on every rank, in the same order."""

    name: ClassVar[str]  # the value of `sharding.engine`
    placement: Placement
    topology: Topology
    wire: WireCounter  # counts what this rank's collectives send

    def __init__(self, placement: Placement, topology: Topology) -> None: ...

    @classmethod
    def groups(cls, skeleton: nn.Module) -> list[Group]:
        """What is gathered together and how often, in the order of the model: for the plan.

        Args:
            skeleton: the model on the meta device.
        """

    def load(self, weights: Weights, device: torch.device) -> nn.Module:
        """The model with this rank's part of every parameter; no rank reads more than it needs."""

    def shard(self, model: nn.Module, ignored: Iterable[nn.Parameter]) -> None:
        """Distribute the parameters of `model` in place, all but `ignored`.

        A base that is sharded already is left alone.
        """

    def after_load(self, model: nn.Module) -> None:
        """Take over a model whose base is in place: own its storage, count its traffic."""

    def set_trainable(self, model: nn.Module, trained: Iterable[nn.Parameter]) -> None:
        """Told what is trained once that is known: no weight before it is needed in backward."""

    def hold(self, model: nn.Module, paths: Collection[str]) -> None:
        """Keep the groups at `paths` gathered from their first use on: W0 is read-only."""

    def release(self, model: nn.Module) -> None:
        """Between steps: free every gathered weight that forward or backward left behind, but for
        what is held.
        """

    def gather_module(self, module: nn.Module) -> AbstractContextManager[dict[str, Tensor]]:
        """The whole parameters of one module by path, for as long as the context is open."""


def engine_class(placement: Placement, sharded: str | None = None) -> type[Engine]:
    """The engine of a placement; `replicated` where W0 is not divided at all.

    Args:
        sharded: the engine that divided the base already, if one did.

    Raises:
        UsageError: there is no such engine, or what it stands on is not installed.
    """
    engines = room("sharding.engines")
    if placement.engine not in engines:  # also where one process needs none
        known = ", ".join(map(str, engines))
        raise UsageError(f"sharding.engine: {placement.engine!r} is none of {known}")
    name = sharded or ("replicated" if placement.shard_size == 1 else placement.engine)
    return engines[name].load()


def build_engine(placement: Placement, topology: Topology, sharded: str | None = None) -> Engine:
    """An engine of `engine_class`; collective where it makes process groups."""
    return engine_class(placement, sharded)(placement, topology)


def sharded_by(model: nn.Module) -> str | None:
    """The engine that divided the model's parameters, or None where they are whole.

    Raises:
        UsageError: it was FSDP1, whose flat parameters hold what is frozen and what is not as one.
    """
    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        raise UsageError(
            "shard: this model is wrapped by FSDP1 (FullyShardedDataParallel); give dlora the bare "
            "model, or one sharded by fully_shard"
        )
    parameters = list(model.parameters())
    if any(hasattr(parameter, "ds_id") for parameter in parameters):
        return "zero3"
    return "fsdp2" if any(map(is_divided, parameters)) else None


def is_divided(parameter: nn.Parameter) -> bool:
    """Whether this rank holds a part of the parameter only."""
    return isinstance(parameter, DTensor) or hasattr(parameter, "ds_id")
