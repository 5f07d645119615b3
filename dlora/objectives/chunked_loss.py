"""Output head and cross entropy on the positions that carry a target, in chunks.

A full logits tensor has tokens × vocabulary elements, several times over in backward: gigabytes
where the vocabulary has 50,000 to 250,000 entries. Here the head sees only positions with a target,
a few hundred at a time, and the gradient with respect to its input is taken at once, in forward;
only that gradient [targets, hidden] outlives a chunk.

    loss = Σ_i −log softmax(f(W h_i))[t_i]        f: what the model's class makes of the logits

Where the class does more than that between decoder and logits, its own logits are used, whole.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from dlora.errors import UsageError
from dlora.lora.layers import CHILD
from dlora.objectives.attention_tables import extend_tables
from dlora.objectives.output_head import OutputHead, output_head, without_cache
from dlora.objectives.own_length import OwnLengths
from dlora.objectives.packed_row import PackedRow, one_sequence_per_row
from dlora.objectives.router_loss import install_router_loss

IGNORED = -100
CHUNK_BYTES = {"cpu": 64 << 20}  # of float32 logits at a time, elsewhere CHUNK_BYTES_ELSEWHERE
CHUNK_BYTES_ELSEWHERE = 256 << 20
_WHOLE_TILES = 256  # rows of a chunk are a multiple, where it has so many

Logits = Callable[[Tensor, Tensor], Tensor]
Wanted = Callable[[OutputHead, Tensor, str | None], Tensor]  # (head, its input, type of device)
# (z [chunk, V], which targets these are) → (their Σ loss, what makes ∂loss/∂z [chunk, V])
Criterion = Callable[[Tensor, slice], tuple[Tensor, Callable[[], Tensor]]]


class ChunkedTargetLoss(torch.autograd.Function):
    """Σ `criterion` of `logits(hidden)`; `parameters` are the head's that are trained."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Logits,
        criterion: Criterion,
        hidden: Tensor,
        positions: Tensor,
        chunk: int,
        needs_grad: bool,
        *parameters: Tensor,
    ) -> Tensor:
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        inputs = (hidden, *parameters) if needs_grad else ()
        sums: list[Tensor | None] = [
            torch.zeros_like(i) if i.requires_grad else None for i in inputs
        ]
        for start in range(0, len(positions), chunk):
            piece = slice(start, start + chunk)
            with torch.set_grad_enabled(needs_grad):
                h = hidden.detach()[piece].requires_grad_(needs_grad)
                z = logits(h, positions[piece])
            loss, gradient_of_loss = criterion(z.detach(), piece)
            total += loss.double()
            wanted = [t for t, s in zip((h, *parameters), sums, strict=False) if s is not None]
            if wanted:
                dz = gradient_of_loss().to(z.dtype)
                # Unused: A and B of a head that is disabled or merged. Their gradient stays zero.
                gradients = iter(torch.autograd.grad(z, wanted, dz, allow_unused=True))
                for index, accumulated in enumerate(sums):
                    if accumulated is not None and (gradient := next(gradients)) is not None:
                        target = accumulated[piece] if index == 0 else accumulated
                        target += gradient
        ctx.sums = sums
        return total.to(torch.float64 if hidden.dtype == torch.float64 else torch.float32)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        scaled = [None if s is None else s.mul_(grads[0].to(s.dtype)) for s in ctx.sums]
        return None, None, scaled[0], None, None, None, *scaled[1:]


def cross_entropy(targets: Tensor) -> Criterion:
    """Σ −log p[t] of the targets t [N]."""

    def of(z: Tensor, piece: slice) -> tuple[Tensor, Callable[[], Tensor]]:
        log_p, t = log_softmax(z), targets[piece]
        return -log_p.gather(1, t[:, None]).sum(), lambda: less_target(log_p, t)

    return of


def log_softmax(z: Tensor) -> Tensor:
    """log p [chunk, V] of logits z, in the dtype that their loss is computed in."""
    dtype = torch.float64 if z.dtype == torch.float64 else torch.float32
    return torch.log_softmax(z, -1, dtype=dtype)


def less_target(log_p: Tensor, targets: Tensor) -> Tensor:
    """∂loss/∂z = p − 1[t], made in the place of log p.

    Autograd would write three tensors of this size more: a gradient that is zero but at the
    targets, the product with it, and the logits in float32.
    """
    p, at = log_p.exp_(), targets[:, None]
    return p.scatter_(1, at, p.gather(1, at) - 1)


def chunk_rows(vocabulary: int, device: str) -> int:
    """Rows of logits that are computed at a time on a type of device."""
    rows = CHUNK_BYTES.get(device, CHUNK_BYTES_ELSEWHERE) // (4 * vocabulary)
    return max(1, rows if rows < _WHOLE_TILES else rows - rows % _WHOLE_TILES)


class Part(Protocol):
    """What a pass is for; where its tokens `end` is that of a row that several share."""

    @property
    def end(self) -> int: ...

    def loss(self, head: OutputHead, hidden: Tensor, targets: Tensor, device: str | None) -> Tensor:
        """A scalar of the input [rows, tokens, H] of the head, which is gathered."""

    def loss_of_logits(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The same of logits [rows, tokens, V] that a class computes whole."""


def install(model: Any, device: str | None = None) -> None:
    """Let a causal language model compute `model(..., targets=[rows, tokens])` → Σ cross entropy.

    `positions`, if they are known, are the places of the targets: see `target_loss`. `lengths` are
    the tokens of each row without padding, on which some models' positions depend; more lengths
    than rows are those of the sequences that share the one row (`packed_row`), with `position_ids`
    that start again for each. An auxiliary loss of its own is left for `router_loss.whole_loss`.
    With `parts` of the batch the result is [parts], a sum for each. With `wanted` it is what that
    function makes of the head's input [rows, tokens, H], or of the class's own logits where those
    have to be computed whole.

    Without `targets` the model's own forward runs. With them it runs as well, and its head computes
    the loss of its input in place of logits: so all that the class does in front of the head stays,
    the hooks of a sharded base gather and free its weights as usual, and the head is called once,
    with its weight gathered, whatever the chunks.

    Args:
        device: the type of device whose chunks are used; by default where the hidden states are.

    Raises:
        UsageError: the model is no decoder with an output head.
    """
    head, own_forward, arguments = output_head(model), model.forward, without_cache(model)
    losses: list[Callable[[Tensor], Tensor]] = []  # the one that is wanted of the next head call
    found: list[Tensor] = []
    own_lengths, router = OwnLengths(model), install_router_loss(model)
    packed = PackedRow(model)
    extend_tables(model)

    def forward(
        self: Any,
        *args: Any,
        targets: Tensor | None = None,
        positions: Tensor | None = None,
        lengths: Sequence[int] | None = None,
        parts: Sequence[Part] = (),
        wanted: Wanted | None = None,
        **kwargs: Any,
    ) -> Any:
        shape = targets.shape if targets is not None else None
        packed.set(lengths, shape, [part.end for part in parts])
        own_lengths.set(lengths, needed=targets is not None, packed=bool(packed.lengths))
        if targets is None:
            return packed.remember(own_forward(*args, **kwargs))
        if positions is None:
            positions = (targets != IGNORED).nonzero()

        def loss(hidden: Tensor) -> Tensor:
            if wanted is not None:
                return wanted(head, hidden, device)
            if not parts:
                return target_loss(head, hidden, targets, positions, device)
            return torch.stack([part.loss(head, hidden, targets, device) for part in parts])

        asked = router.begin() if router is not None else {}
        losses[:], found[:] = [loss] if head.finish is not None else [], []
        try:
            known = packed.lengths or "position_ids" not in kwargs
            with one_sequence_per_row() if known else nullcontext(), packed.computing():
                outputs = own_forward(*args, **kwargs, **asked, **arguments)
            if asked and router is not None:
                in_rows = [sum(lengths)] if packed.lengths and lengths else lengths
                router.compute(outputs, targets.shape, in_rows)
            if head.finish is not None:
                return packed.remember(found.pop())
            logits = outputs.logits
            if wanted is not None:
                return packed.remember(wanted(head, logits, device))
            if not parts:
                return packed.remember(loss_of_logits(logits, targets, positions))
            each = [part.loss_of_logits(logits, targets) for part in parts]
            return packed.remember(torch.stack(each))
        finally:
            losses.clear()
            found.clear()

    def head_forward(self: Any, hidden: Tensor) -> Tensor:
        if not losses:
            return type(self).forward(self, hidden)
        found.append(losses.pop()(hidden))
        return hidden.new_zeros(*hidden.shape[:-1], 1)

    model.forward = types.MethodType(forward, model)
    if head.finish is not None:
        head.module.forward = types.MethodType(head_forward, head.module)


def target_loss(
    head: OutputHead,
    hidden: Tensor,
    targets: Tensor,
    positions: Tensor,
    device: str | None = None,
    *,
    criterion: Criterion | None = None,
    inside: Callable[[Tensor], AbstractContextManager[None]] | None = None,
    places: Tensor | None = None,
) -> Tensor:
    """Σ cross entropy over the positions with a target, float32 (float64 for a float64 model).

    Without any target the result is 0 with zero gradients, so that ranks stay in step.

    Args:
        hidden: [rows, tokens, H], the input of the head.
        targets: [rows, tokens], −100 where there is none.
        positions: [N, 2], the (row, token) of each target.
        device: as of `install`.
        criterion: what is summed in place of the cross entropy.
        inside, places: of a part of a batch: what is entered around each product of the head,
            with those of the places [N, 2] that are its rows'.
    """
    h, t = hidden[tuple(positions.T)], targets[tuple(positions.T)]
    module, finish = head.module, head.finish
    assert finish is not None
    stream = getattr(getattr(module, CHILD, None), "stream", None)
    own = stream.at if stream is not None else lambda at: nullcontext()
    around, at_places = inside or own, positions if places is None else places

    def logits(rows: Tensor, at: Tensor) -> Tensor:
        """[chunk, V] of rows [chunk, H] at the places [chunk, 2]; the head's adapter included."""
        with around(at):
            return finish(type(module).forward(module, rows))

    chunk = chunk_rows(head.vocabulary, device or hidden.device.type)
    trained = [p for p in module.parameters() if p.requires_grad]
    needs_grad = torch.is_grad_enabled() and (h.requires_grad or bool(trained))
    summed = criterion or cross_entropy(t)
    return ChunkedTargetLoss.apply(logits, summed, h, at_places, chunk, needs_grad, *trained)


def loss_of_logits(logits: Tensor, targets: Tensor, positions: Tensor) -> Tensor:
    """The same of the logits [rows, tokens, V] that a class has computed."""
    if logits.shape[:2] != targets.shape:
        raise UsageError(
            f"model.path: its class computes logits {list(logits.shape)} for tokens "
            f"{list(targets.shape)}, so the loss of each token is not known"
        )
    z, t = logits[tuple(positions.T)], targets[tuple(positions.T)]
    return F.cross_entropy(at_least_float32(z), t, reduction="sum")


def at_least_float32(logits: Tensor) -> Tensor:
    """Logits in the dtype that their loss is computed in."""
    return logits if logits.dtype == torch.float64 else logits.float()
