"""The gradient of every adapted W0 over a few batches, in factors, for LoRA-GA.

    G = Σ dyᵀx [m, n], over all target tokens of all ranks, is never formed:

    pass 1    Y = G·Ω   [m, q]    Ω random          Q = an orthonormal basis of Y
    pass 2    Z = Gᵀ·Q  [n, q]                      P = one of Z
    pass 3    Y = G·P                               Q = one of Y
    pass 4    Z = Gᵀ·Q                              G ≈ Q·Zᵀ

A pass is a forward and backward over the batches: autograd stores a layer's input as usual, and
its product is added up as soon as the gradient of its output is there. One sum over ranks ends the
pass. So the result does not depend on how the batches are divided, but for rounding. It is exact
where the rank of G is at most q, and otherwise what a randomised decomposition with one power
iteration is; LoRA-GA takes the 2r largest directions of q = 4r + 8.

Losses are sums over target tokens, so that every token has the same weight. Adapters and dropout
are off meanwhile.

Source: Halko, Martinsson, Tropp 2011, https://arxiv.org/abs/0909.4061, algorithm 4.4.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dlora.errors import UsageError
from dlora.lora.attach import attachment_of, disabled
from dlora.lora.dropout import seed_of
from dlora.lora.layers import AdaptedLayer
from dlora.methods.matrix_init import Layer, Started, layers_of, start_from_matrices
from dlora.sharding.comm_bytes import WireCounter, ring_reduce_bytes
from dlora.sharding.topology import Topology

LossOf = Callable[[nn.Module, Any], Tensor]
Fold = Callable[[Tensor, Tensor], None]
PASSES = 4


def kept_rank(layer: Layer) -> int:
    """q: the paper's code keeps 4r, of which 2r are used; a few more sharpen a small r."""
    return min(4 * layer.adapter.r + 8, *layer.sizes)


class GradientEstimate:
    """Estimates the gradients of a model's adapted weights, and starts the adapters from them.

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
        if not self.layers:
            raise UsageError("init_lora_weights: lora_ga: no layer is adapted")
        self._bases: dict[str, Tensor] = {layer.path: _omega(layer) for layer in self.layers}
        self._left: dict[str, Tensor] = {}  # Q of G ≈ Q·Zᵀ
        self._sums: dict[str, Tensor] = {}

    def run(self, batches: Sequence[Any], loss_of: LossOf) -> None:
        """Make all passes over this rank's batches. Collective.

        Where ranks have unequally many, those that run short repeat their last with weight zero, as
        their peers gather W0 together with them.

        Raises:
            UsageError: on every rank: one of them has no batch at all.
        """
        for number in range(PASSES):
            flat = self._lay_out(transposed=number % 2 == 1)
            with self._watching(transposed=number % 2 == 1):
                for batch, weight in self._in_step(batches):
                    (loss_of(self.model, batch) * weight).backward()
            if self.topology.world > 1:
                dist.all_reduce(flat)
                if self.wire is not None:
                    self.wire.add(ring_reduce_bytes(flat.nbytes, self.topology.world))
            if number < PASSES - 1:
                self._left = {p: torch.linalg.qr(t).Q for p, t in self._sums.items()}
                self._bases = self._left

    def start(self) -> Started:
        """Start the adapters from the estimate. Collective.

        Raises:
            UsageError: on every rank: no layer has a gradient to start from.
        """
        started = start_from_matrices(self.model, self.topology, self._gradient, self.wire)
        if len(started.left) == started.layers:
            raise UsageError(
                f"init_lora_weights: lora_ga: all gradients, as that of {started.left[0]}, have "
                "too low a rank; estimate them on more target tokens"
            )
        return started

    def _gradient(self, layer: Layer) -> Tensor:
        return self._left[layer.path] @ self._sums[layer.path].t()

    def _lay_out(self, *, transposed: bool) -> Tensor:
        """Zeros for the sums of a pass, as views of one tensor; returns that."""
        sizes = {lay.path: (lay.sizes[int(transposed)], kept_rank(lay)) for lay in self.layers}
        like = self.layers[0].adapter.lora_A
        flat = torch.zeros(sum(a * b for a, b in sizes.values()), dtype=like.dtype).to(like.device)
        parts = flat.split([a * b for a, b in sizes.values()])
        self._sums = {p: t.view(sizes[p]) for p, t in zip(sizes, parts, strict=True)}
        return flat

    @contextmanager
    def _watching(self, *, transposed: bool) -> Iterator[None]:
        """Inside, every backward pass adds its products."""
        training = {module: module.training for module in self.model.modules()}
        self.model.eval()
        handles = [
            layer.module.register_forward_hook(self._watch(layer, transposed), with_kwargs=True)
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

    def _watch(self, layer: Layer, transposed: bool) -> Callable[..., Tensor]:
        fold = functools.partial(self._fold, layer, transposed)

        def watch(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor:
            x = args[0] if args else next(iter(kwargs.values()))
            anchor = torch.zeros((), device=output.device, requires_grad=True)
            return _Watched.apply(output, x, anchor, fold)

        return watch

    @torch.no_grad()
    def _fold(self, layer: Layer, transposed: bool, x: Tensor, dy: Tensor) -> None:
        assert isinstance(layer.module, AdaptedLayer)
        basis = self._bases[layer.path]
        product = layer.module.gradient_times(layer.module, x, dy, basis, transposed=transposed)
        self._sums[layer.path] += product

    def _in_step(self, batches: Sequence[Any]) -> Iterator[tuple[Any, float]]:
        """(batch, weight): as many on every rank as there are on the one that has most."""
        device = next(self.model.parameters()).device
        numbers = torch.tensor([len(batches), -len(batches)], device=device)
        if self.topology.world > 1:
            dist.all_reduce(numbers, op=dist.ReduceOp.MAX)
        most, fewest = numbers.tolist()
        if fewest == 0:
            raise UsageError("start_from_gradients: every rank needs a batch, and some have none")
        for index in range(most):
            yield batches[min(index, len(batches) - 1)], float(index < len(batches))


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


def _omega(layer: Layer) -> Tensor:
    """Ω [n, q], the same on every rank."""
    like = layer.adapter.lora_A
    draw = torch.Generator().manual_seed(seed_of("lora_ga", layer.path))
    shape = layer.sizes[1], kept_rank(layer)
    return torch.randn(shape, generator=draw, dtype=torch.float64).to(like.device, like.dtype)
