"""No sharding: every rank has all of W0. The cheapest placement when it fits."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from dlora.sharding.comm_bytes import WireCounter
from dlora.sharding.engines.gather_groups import Group
from dlora.sharding.engines.protocol import Device, Weights
from dlora.sharding.engines.shard_loading import fill, slots_of
from dlora.sharding.engines.storage import own_storage
from dlora.sharding.topology import Placement, Topology


class Replicated:
    """Engine for `base: none` and for one process."""

    name = "replicated"
    offered = False  # where W0 is not divided, whatever `sharding.engine` is

    def __init__(self, placement: Placement, topology: Topology) -> None:
        self.placement, self.topology, self.wire = placement, topology, WireCounter()

    @classmethod
    def groups(cls, skeleton: nn.Module) -> list[Group]:
        """One, which is resident already."""
        return [Group("", tuple(skeleton.parameters()), freed=False, held=True)]

    def load(self, weights: Weights, device: torch.device) -> nn.Module:
        if weights.element_wise:

            def make_shard(meta: nn.Parameter) -> tuple[nn.Parameter, int, Tensor]:
                values = torch.empty(meta.shape, dtype=meta.dtype, device=device)
                return nn.Parameter(values, requires_grad=False), 0, values.view(-1)

            model = weights.empty()
            fill(slots_of(model), weights, make_shard)
            return model.to(device)
        return weights.from_pretrained(**({} if device.type == "cpu" else {"device_map": device}))

    def shard(self, model: nn.Module, ignored: Iterable[nn.Parameter], device: Device) -> None:
        """Every rank has all of it."""
        if device is not None:
            model.to(device)

    def after_load(self, model: nn.Module) -> None:
        own_storage(model)

    def set_trainable(self, model: nn.Module, trained: Iterable[nn.Parameter]) -> None:
        """Nothing to do: nothing is gathered."""

    def keep_gathered(self, model: nn.Module, paths: Collection[str]) -> None:
        """Nothing to do: everything is whole."""

    def release_gathered(self, model: nn.Module, paths: Collection[str]) -> None:
        """Nothing to do: everything is whole."""

    def free_gathered(self, model: nn.Module) -> None:
        """Nothing to do: nothing was gathered."""

    @contextmanager
    def staying(self, model: nn.Module) -> Iterator[None]:
        yield

    @contextmanager
    def gather_module(self, module: nn.Module) -> Iterator[dict[str, Tensor]]:
        yield {path: parameter.detach() for path, parameter in module.named_parameters()}
