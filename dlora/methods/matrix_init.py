"""Starts adapters from whole matrices: W0, or the estimate of its gradient.

    layers, the most expensive first, in rounds of one for each rank
    a round    gather W0 of each layer in turn; its owner copies it, the others free it
               all owners factorise at the same time
               A0, B0 of each layer: broadcast from its owner

One factorisation for each layer in all, of which every rank gets the same bits. Of a sharded base a
rank has one whole W0 beside the one that is being gathered.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dlora.errors import and_more
from dlora.lora.attach import attachment_of, end_start, named_adapters
from dlora.lora.layers import AdaptedLayer
from dlora.lora.variants import LoraAdapter
from dlora.lora.whole_weights import WholeWeights
from dlora.sharding.comm_bytes import WireCounter, ring_gather_bytes
from dlora.sharding.replica.owned_state import owners
from dlora.sharding.topology import Topology

Factors = tuple[Tensor, Tensor]


class Layer(NamedTuple):
    """An adapted module."""

    path: str
    module: nn.Module
    adapter: LoraAdapter

    @property
    def sizes(self) -> tuple[int, int]:
        """m and n of its weight."""
        return self.adapter.lora_B.shape[0], self.adapter.lora_A.shape[1]

    @property
    def cost(self) -> float:
        """Relative cost of its factorisation: a product and an eigen-decomposition."""
        small, large = sorted(self.sizes)
        return small**2 * (large + 10 * small)


class Started(NamedTuple):
    """The result of a start; as text, a line for the user.

    Attributes:
        name: of the initialisation.
        layers: number of adapted layers.
        left: those whose matrix has too low a rank: they start as with `True`.
    """

    name: str
    layers: int
    left: list[str]
    seconds: float

    def __str__(self) -> str:
        done = f"{self.layers - len(self.left)} layers factorised in {self.seconds:.0f} s"
        if not self.left:
            return f"init_lora_weights: {self.name}: {done}"
        return (
            f"init_lora_weights: {self.name}: {done}; {len(self.left)} start as with true, because "
            f"their matrix has too low a rank: {and_more(self.left)}"
        )


def layers_of(model: nn.Module) -> list[Layer]:
    """The adapted modules, the most expensive first; the same on every rank."""
    layers = [Layer(*found) for found in named_adapters(model)]
    return sorted(layers, key=lambda layer: -layer.cost)


@torch.no_grad()
def start_from_weights(
    model: nn.Module,
    topology: Topology,
    whole_weights: WholeWeights,
    wire: WireCounter | None = None,
) -> Started:
    """Start every adapter from its W0. Collective.

    Args:
        whole_weights: yields the whole parameters of a module.
        wire: counts what is broadcast.
    """
    began, left = time.perf_counter(), []
    layers = layers_of(model)
    for start in range(0, len(layers), topology.world):
        batch, own = layers[start : start + topology.world], None
        for rank, layer in enumerate(batch):
            with whole_weights(layer.module) as weights:
                if rank == topology.rank:
                    own = weights["weight"].clone()
                del weights  # before the next one is gathered
        found: list[Factors | None] = [None] * len(batch)
        if own is not None:
            mine = batch[topology.rank]
            assert isinstance(mine.module, AdaptedLayer)
            found[topology.rank] = _factors(model, mine, mine.module.as_product(own))
            del own
        for rank, layer in enumerate(batch):
            left += _start(layer, found[rank], rank, topology, wire)
    return _done(model, layers, left, began)


@torch.no_grad()
def start_from_matrices(
    model: nn.Module,
    topology: Topology,
    matrix_of: Callable[[Layer], Tensor],
    wire: WireCounter | None = None,
) -> Started:
    """Start every adapter from a matrix that any rank can make. Collective.

    Args:
        matrix_of: [m, n] for a layer; called on the rank that factorises it.
    """
    began, left = time.perf_counter(), []
    layers = layers_of(model)
    chosen = owners([layer.cost for layer in layers], topology.world)
    found = {
        layer.path: _factors(model, layer, matrix_of(layer))
        for layer, owner in zip(layers, chosen, strict=True)
        if owner == topology.rank
    }
    for layer, owner in zip(layers, chosen, strict=True):
        left += _start(layer, found.get(layer.path), owner, topology, wire)
    end_start(model)
    return _done(model, layers, left, began)


def _factors(model: nn.Module, layer: Layer, matrix: Tensor) -> Factors | None:
    attachment, adapter = attachment_of(model), layer.adapter
    init, config = attachment.init, attachment.config
    return init.factors(matrix, adapter.r, adapter.scaling, **init.options_from(config))


def _start(
    layer: Layer,
    found: Factors | None,
    owner: int,
    topology: Topology,
    wire: WireCounter | None,
) -> list[str]:
    """Give the owner's factors to the adapter, on every rank; its path where there are none."""
    A, B = layer.adapter.lora_A, layer.adapter.lora_B
    flat = A.new_zeros(1 + A.numel() + B.numel())  # whether there are any, A0, B0
    if found is not None:
        flat = torch.cat([flat.new_ones(1), *(part.to(flat.dtype).flatten() for part in found)])
    if topology.world > 1:
        dist.broadcast(flat, src=owner)
        if wire is not None:
            wire.add(ring_gather_bytes(flat.nbytes, topology.world))
    if not bool(flat[0]):
        return [layer.path]
    A0, B0 = flat[1:].split([A.numel(), B.numel()])
    layer.adapter.start_from(A0.view_as(A), B0.view_as(B))
    return []


def _done(model: nn.Module, layers: list[Layer], left: list[str], began: float) -> Started:
    name = str(attachment_of(model).config.init_lora_weights)
    return Started(name, len(layers), left, time.perf_counter() - began)
