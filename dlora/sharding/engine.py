"""What an engine is, and which there are. An engine decides where W0 lives, and nothing else.

A new engine is one file: a class with these members, and a line in `ENGINES`.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dlora.errors import LaterError, UsageError
from dlora.sharding.mesh import Placement, Topology
from dlora.sharding.wire import WireCounter


class Engine(Protocol):
    """Places a frozen base over ranks. All members are called on every rank, in the same order."""

    placement: Placement
    topology: Topology
    wire: WireCounter  # counts what this rank's collectives send

    def __init__(self, placement: Placement, topology: Topology) -> None: ...

    def loading(self, skeleton: nn.Module) -> dict[str, Any]:
        """Keyword arguments for transformers' `from_pretrained`: it reads only this rank's shards.

        Args:
            skeleton: the model on the meta device.
        """

    def shard(self, model: nn.Module, ignored: Iterable[nn.Parameter]) -> None:
        """Distribute the parameters of `model` in place, all but `ignored`.

        A base that is sharded already is left alone.
        """

    def adopt(self, model: nn.Module) -> None:
        """Take over a model whose base is in place: own its storage, count its traffic."""

    def expect_gradients(self, model: nn.Module, trained: Iterable[nn.Parameter]) -> None:
        """Told what is trained once that is known: no weight before it is needed in backward."""

    def release(self, model: nn.Module) -> None:
        """Between steps: free every gathered weight that forward or backward left behind."""

    def whole_weights(self, module: nn.Module) -> AbstractContextManager[dict[str, Tensor]]:
        """The whole parameters of one module by path, for as long as the context is open."""


ENGINES = {
    "replicated": "dlora.sharding.replicated:Replicated",
    "fsdp2": "dlora.sharding.fsdp2:Fsdp2",
}
PLANNED = ("zero3",)


def build_engine(placement: Placement, topology: Topology, sharded: str | None = None) -> Engine:
    """The engine of a placement; `replicated` where W0 is not divided at all.

    Args:
        sharded: the engine that divided the base already, if one did.
    """
    name = sharded or ("replicated" if placement.shard_size == 1 else placement.engine)
    if name in PLANNED:
        raise LaterError("sharding.engine", name)
    if name not in ENGINES:
        raise UsageError(f"sharding.engine: {name!r} is none of {', '.join(ENGINES)}")
    module, _, cls = ENGINES[name].partition(":")
    return getattr(importlib.import_module(module), cls)(placement, topology)


def sharded_by(model: nn.Module) -> str | None:
    """The engine that divided the model's parameters, or None where they are whole."""
    parameters = list(model.parameters())
    if any(hasattr(parameter, "ds_id") for parameter in parameters):
        return "zero3"
    return "fsdp2" if any(map(is_divided, parameters)) else None


def is_divided(parameter: nn.Parameter) -> bool:
    """Whether this rank holds a part of the parameter only."""
    return isinstance(parameter, DTensor) or hasattr(parameter, "ds_id")
