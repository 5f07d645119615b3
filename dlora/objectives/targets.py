"""Output head and cross entropy on the positions that carry a target, in chunks.

A full logits tensor has tokens × vocabulary elements, several times over in backward: gigabytes where
the vocabulary has 50,000 to 250,000 entries. Here the head sees only positions with a target, a few
hundred at a time, and the gradient with respect to its input is taken at once, in forward; only that
gradient [targets, hidden] outlives a chunk.

    loss = Σ_i −log softmax(f(W h_i))[t_i]        f: the model's own soft cap or scale of the logits
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dlora.errors import UsageError

IGNORED = -100
CHUNK_BYTES = 64 << 20  # of float32 logits at a time

Logits = Callable[[Tensor], Tensor]


class ChunkedTargetLoss(torch.autograd.Function):
    """Σ cross entropy of `logits(hidden)`; see the module. `parameters` are the head's trained ones."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Logits,
        hidden: Tensor,
        targets: Tensor,
        chunk: int,
        needs_grad: bool,
        *parameters: Tensor,
    ) -> Tensor:
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        inputs = (hidden, *parameters) if needs_grad else ()
        sums: list[Tensor | None] = [
            torch.zeros_like(i) if i.requires_grad else None for i in inputs
        ]
        for start in range(0, len(targets), chunk):
            piece = slice(start, start + chunk)
            with torch.set_grad_enabled(needs_grad):
                h = hidden.detach()[piece].requires_grad_(needs_grad)
                loss = F.cross_entropy(
                    _at_least_float32(logits(h)), targets[piece], reduction="sum"
                )
            total += loss.detach().double()
            wanted = [t for t, s in zip((h, *parameters), sums, strict=False) if s is not None]
            if wanted:
                gradients = iter(torch.autograd.grad(loss, wanted))
                for index, accumulated in enumerate(sums):
                    if accumulated is not None:
                        target = accumulated[piece] if index == 0 else accumulated
                        target += next(gradients)
        ctx.sums = sums
        return total.to(torch.float64 if hidden.dtype == torch.float64 else torch.float32)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        scaled = [None if s is None else s.mul_(grads[0].to(s.dtype)) for s in ctx.sums]
        return None, scaled[0], None, None, None, *scaled[1:]


def target_loss(head: nn.Module, logits: Logits, hidden: Tensor, targets: Tensor) -> Tensor:
    """Σ cross entropy over the positions with a target, float32 (float64 for a float64 model).

    Args:
        head: the output head, called once so that whatever gathers its weight does so.
        logits: hidden [chunk, H] → logits [chunk, V], inside the head's forward.
        hidden: [rows, tokens, H]; targets: [rows, tokens], −100 where there is none.

    Without any target the result is 0 with zero gradients, so that ranks stay in step.
    """
    chosen = targets != IGNORED
    h, t = hidden[chosen], targets[chosen]
    vocabulary = getattr(head, "out_features", None) or getattr(head, "nf", 0) or 1 << 16
    chunk = max(1, CHUNK_BYTES // (4 * int(vocabulary)))
    trained = [p for p in head.parameters() if p.requires_grad]
    needs_grad = torch.is_grad_enabled() and (h.requires_grad or bool(trained))

    def forward_in_chunks(_: Any, rows: Tensor) -> Tensor:
        return ChunkedTargetLoss.apply(logits, rows, t, chunk, needs_grad, *trained)

    own_forward = head.__dict__.get("forward")
    head.forward = types.MethodType(forward_in_chunks, head)  # type: ignore[method-assign]
    try:
        return head(h)
    finally:
        if own_forward is None:
            del head.forward
        else:
            head.forward = own_forward


def install(model: nn.Module) -> None:
    """Teach a causal language model `model(..., targets=[rows, tokens])` → Σ cross entropy.

    Without `targets` the model's own forward runs. It is the *root's* forward that is extended, so
    that a sharded base is gathered and freed by the hooks that it already has.

    Raises:
        UsageError: the model is no decoder with an output head.
    """
    parts = model_parts(model)
    original = model.forward

    def forward(self: Any, *args: Any, targets: Tensor | None = None, **kwargs: Any) -> Any:
        if targets is None:
            return original(*args, **kwargs)
        hidden = parts.decoder(*args, use_cache=False, **kwargs)[0]
        return target_loss(parts.head, parts.logits, hidden, targets)

    model.forward = types.MethodType(forward, model)  # type: ignore[method-assign]


class Parts:
    """The decoder and the head of a causal language model, and what it does to logits between."""

    def __init__(self, decoder: nn.Module, head: nn.Module, config: Any) -> None:
        self.decoder, self.head = decoder, head
        self._cap = getattr(config, "final_logit_softcapping", None)
        self._scale = getattr(config, "logit_scale", None) or 1.0  # Cohere multiplies
        self._divide = getattr(config, "logits_scaling", None) or 1.0  # Granite divides

    def logits(self, hidden: Tensor) -> Tensor:
        """The head's own forward (adapter included), then the model's scale and soft cap."""
        logits = type(self.head).forward(self.head, hidden)
        logits = logits * self._scale / self._divide if self._scaled else logits
        return torch.tanh(logits / self._cap) * self._cap if self._cap else logits

    @property
    def _scaled(self) -> bool:
        return self._scale != 1.0 or self._divide != 1.0


def model_parts(model: Any) -> Parts:
    """Find the decoder and the output head the way transformers names them."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    decoder = getattr(model, "base_model", None)
    config = getattr(model, "config", None)
    if head is None or decoder is None or decoder is model:
        raise UsageError(
            f"model.path: {type(model).__name__} is no causal language model with an output head"
        )
    if getattr(config, "is_encoder_decoder", False):
        raise UsageError(f"model.path: {type(model).__name__} is an encoder-decoder model")
    return Parts(decoder, head, config)


def _at_least_float32(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()
