"""Estimating the gradient of every adapted W0 over a few batches, for LoRA-GA.

    forward    a host's input is kept for backward, as autograd keeps its own
    backward   G = dyᵀx of one host at a time, in float32
               Σ over ranks, to the rank that owns the layer
               the owner folds it into a sum of rank q, and it is gone

Losses are sums over target tokens, so that tokens weigh alike wherever they are. The model is its
own base meanwhile: adapters off, dropout off. The sums are exact up to rank q and of the nearest
kind past it (`dlora.lora.low_rank_sum`); LoRA-GA looks at the 2r largest directions.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dlora.errors import UsageError
from dlora.initialise import Layer, Started, layers_of, start_from_sums
from dlora.lora.attach import attachment_of, disabled
from dlora.lora.hosts import HostMixin
from dlora.lora.low_rank_sum import LowRankSum
from dlora.sharding.mesh import Topology
from dlora.sharding.spread import owners
from dlora.sharding.wire import WireCounter, ring_gather_bytes

Fold = Callable[[Tensor, Tensor], None]
LossOf = Callable[[nn.Module, Any], Tensor]


def kept_rank(r: int) -> int:
    """q for a LoRA rank: the paper's code takes 4r, of which 2r are used."""
    return 4 * r + 8


class _Watched(torch.autograd.Function):
    """y as it is; in backward `fold` sees the input and the gradient of the output.

    `anchor` requires a gradient, so that there is one for y although all weights are frozen.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, anchor: Tensor, fold: Fold) -> Tensor:
        ctx.save_for_backward(x)
        ctx.fold = fold
        return y.detach()  # no view of y for autograd, so that what follows may work in place

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        ctx.fold(*ctx.saved_tensors, grads[0])
        return (grads[0] if ctx.needs_input_grad[0] else None), None, None, None


class GradientEstimate:
    """The sums of gradients of a model's adapted weights, each on the rank that owns the layer.

    Args:
        wire: counts what is reduced.

    Raises:
        UsageError: the adapters do not start from gradients.
    """

    def __init__(
        self, model: nn.Module, topology: Topology, wire: WireCounter | None = None
    ) -> None:
        if attachment_of(model).init.needs != "gradient":
            raise UsageError(
                "init_lora_weights: these adapters do not start from gradients; attach with "
                "init_lora_weights='lora_ga'"
            )
        self.model, self.topology, self.wire = model, topology, wire
        self.layers = layers_of(model)
        chosen = owners([layer.cost for layer in self.layers], topology.world)
        self.owners = {layer.path: r for layer, r in zip(self.layers, chosen, strict=True)}
        self.sums = {
            layer.path: LowRankSum(min(kept_rank(layer.adapter.r), *layer.sizes))
            for layer in self.layers
            if self.owners[layer.path] == topology.rank
        }
        self._seen: set[str] = set()

    def add(self, batches: Iterable[Any], loss_of: LossOf) -> None:
        """Add the gradients of this rank's batches. Collective, host by host and batch by batch.

        Where ranks have unequally many, those that run short repeat their last with weight zero, as
        their peers gather W0 together with them.

        Raises:
            UsageError: on every rank: one of them has no batch at all.
        """
        with self.watching():
            for batch, weight in self._in_step(iter(batches)):
                (loss_of(self.model, batch) * weight).backward()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Inside, every backward pass adds its gradients."""
        training = {module: module.training for module in self.model.modules()}
        self.model.eval()
        handles = [
            layer.host.register_forward_hook(self._watch(layer), with_kwargs=True)
            for layer in self.layers
        ]
        try:
            with disabled(self.model), torch.enable_grad():
                yield
        finally:
            for handle in handles:
                handle.remove()
            for module, was in training.items():
                module.training = was

    def start(self) -> Started:
        """Start the adapters from what has been added up. Collective.

        Raises:
            UsageError: on every rank: a layer took no part in any loss.
        """
        idle = [layer.path for layer in self.layers if layer.path not in self._seen]
        if idle:
            raise UsageError(
                f"init_lora_weights: lora_ga: {idle[0]} took no part in any loss, so it has no "
                "gradient to start from"
            )
        return start_from_sums(self.model, self.topology, self.owners, self.sums, self.wire)

    def _in_step(self, batches: Iterator[Any]) -> Iterator[tuple[Any, float]]:
        """(batch, weight) until no rank has another one."""
        device, last = next(self.model.parameters()).device, None
        while True:
            batch = next(batches, None)
            mine = [batch is not None, batch is None and last is None]
            flags = torch.tensor(mine, dtype=torch.int32, device=device)
            if self.topology.world > 1:
                dist.all_reduce(flags, op=dist.ReduceOp.MAX)
            going, lost = flags.tolist()
            if not going:
                return
            if lost:
                raise UsageError("start_from_gradients: some rank has no batches")
            yield (last, 0.0) if batch is None else (batch, 1.0)
            last = last if batch is None else batch

    def _watch(self, layer: Layer) -> Callable[..., Tensor]:
        fold = functools.partial(self._fold, layer)

        def watch(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor:
            x = args[0] if args else next(iter(kwargs.values()))
            anchor = torch.zeros((), device=output.device, requires_grad=True)
            return _Watched.apply(output, x, anchor, fold)

        return watch

    @torch.no_grad()
    def _fold(self, layer: Layer, x: Tensor, dy: Tensor) -> None:
        assert isinstance(layer.host, HostMixin)
        dtype, owner = layer.adapter.lora_A.dtype, self.owners[layer.path]
        self._seen.add(layer.path)
        gradient = layer.host.weight_gradient(layer.host, x, dy, dtype).contiguous()
        if self.topology.world > 1:
            dist.reduce(gradient, dst=owner)
            if self.wire is not None:
                self.wire.add(ring_gather_bytes(gradient.nbytes, self.topology.world))
        if owner == self.topology.rank:
            self.sums[layer.path].add(gradient)
