"""Output head and cross entropy on the positions that carry a target, in chunks.

A full logits tensor has tokens × vocabulary elements, several times over in backward: gigabytes
where the vocabulary has 50,000 to 250,000 entries. Here the head sees only positions with a target,
a few hundred at a time, and the gradient with respect to its input is taken at once, in forward;
only that gradient [targets, hidden] outlives a chunk.

    loss = Σ_i −log softmax(f(W h_i))[t_i]        f: the model's own soft cap or scale of the logits
"""

from __future__ import annotations

import types
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dlora.errors import UsageError
from dlora.lora.layers import CHILD

IGNORED = -100
CHUNK_BYTES = 64 << 20  # of float32 logits at a time

Logits = Callable[[Tensor, Tensor], Tensor]


class ChunkedTargetLoss(torch.autograd.Function):
    """Σ cross entropy of `logits(hidden)`; see the module. `parameters`: the head's, trained."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Logits,
        hidden: Tensor,
        targets: Tensor,
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
        for start in range(0, len(targets), chunk):
            piece = slice(start, start + chunk)
            with torch.set_grad_enabled(needs_grad):
                h = hidden.detach()[piece].requires_grad_(needs_grad)
                z = _at_least_float32(logits(h, positions[piece]))
                loss = F.cross_entropy(z, targets[piece], reduction="sum")
            total += loss.detach().double()
            wanted = [t for t, s in zip((h, *parameters), sums, strict=False) if s is not None]
            if wanted:
                # Unused: A and B of a head that is disabled or merged. Their gradient stays zero.
                gradients = iter(torch.autograd.grad(loss, wanted, allow_unused=True))
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
        return None, scaled[0], None, None, None, None, *scaled[1:]


def target_loss(head: nn.Module, logits: Logits, hidden: Tensor, targets: Tensor) -> Tensor:
    """Σ cross entropy over the positions with a target, float32 (float64 for a float64 model).

    Args:
        head: the output head, called once so that whatever gathers its weight does so.
        logits: hidden [chunk, H] and where its rows stand in the batch [chunk, 2] (row, token) →
            logits [chunk, V], inside the head's forward.
        hidden: [rows, tokens, H]; targets: [rows, tokens], −100 where there is none.

    Without any target the result is 0 with zero gradients, so that ranks stay in step.
    """
    positions = (targets != IGNORED).nonzero()
    h, t = hidden[tuple(positions.T)], targets[tuple(positions.T)]
    vocabulary = getattr(head, "out_features", None) or getattr(head, "nf", 0) or 1 << 16
    chunk = max(1, CHUNK_BYTES // (4 * int(vocabulary)))
    trained = [p for p in head.parameters() if p.requires_grad]
    needs_grad = torch.is_grad_enabled() and (h.requires_grad or bool(trained))

    def forward_in_chunks(_: Any, rows: Tensor) -> Tensor:
        return ChunkedTargetLoss.apply(logits, rows, t, positions, chunk, needs_grad, *trained)

    own_forward = head.__dict__.get("forward")
    head.forward = types.MethodType(forward_in_chunks, head)
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

    model.forward = types.MethodType(forward, model)


class Parts:
    """The decoder and the head of a causal language model, and what it does to logits between."""

    def __init__(self, model: nn.Module, decoder: nn.Module, head: nn.Module) -> None:
        self.decoder, self.head = decoder, head
        config = getattr(model, "config", None)
        caps = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
        self._cap = next((cap for name in caps if (cap := getattr(config, name, None))), None)
        scale = getattr(model, "logit_scale", None) or 1.0  # Cohere
        scale *= getattr(decoder, "lm_head_multiplier", None) or 1.0  # Falcon-H1
        self._scale = scale / (getattr(config, "logits_scaling", None) or 1.0)  # Granite

    def logits(self, hidden: Tensor, positions: Tensor) -> Tensor:
        """The head's own forward (adapter included), then the model's scale and soft cap."""
        stream = getattr(getattr(self.head, CHILD, None), "stream", None)
        with stream.at(positions) if stream is not None else nullcontext():
            return self.finish(type(self.head).forward(self.head, hidden))

    def finish(self, logits: Tensor) -> Tensor:
        """What the model does to its head's output."""
        logits = logits * self._scale if self._scale != 1.0 else logits
        return torch.tanh(logits / self._cap) * self._cap if self._cap else logits


def model_parts(model: Any) -> Parts:
    """Find the decoder and the output head the way transformers names them.

    Raises:
        UsageError: the model is no decoder with an output head, or computes something between them
            or after them that is not known here.
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    decoder = getattr(model, "base_model", None)
    if head is None or decoder is None or decoder is model:
        raise UsageError(
            f"model.path: {type(model).__name__} is no causal language model with an output head"
        )
    if getattr(model.config, "is_encoder_decoder", False):
        raise UsageError(f"model.path: {type(model).__name__} is an encoder-decoder model")
    parts = Parts(model, decoder, head)
    others = [n for n, child in model.named_children() if child not in (decoder, head)]
    others = [n for n in others if any(True for _ in model.get_submodule(n).parameters())]
    if others or head not in model.children() or not _is_whole(model, parts):
        raise UsageError(
            f"model.path: {type(model).__name__} does more than decoder, output head and a scale "
            "or soft cap of the logits, so its loss cannot be computed in chunks"
        )
    return parts


class _Decoder(nn.Module):
    """Stands in for a decoder, its inner modules and what it returns: a given hidden state."""

    def __init__(self, decoder: nn.Module, hidden: Tensor) -> None:
        super().__init__()
        self.__dict__.update(original=decoder, last_hidden_state=hidden)

    def forward(self, *_: Any, **__: Any) -> _Decoder:
        return self

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.original, name, None)
        return self if isinstance(value, nn.Module) else value

    def __getitem__(self, index: Any) -> Any:
        return (self.last_hidden_state,)[index]


class _Head(nn.Identity):
    """Stands in for an output head: its logits are the hidden state."""

    weight = torch.zeros(())


def _is_whole(model: nn.Module, parts: Parts) -> bool:
    """Whether `parts.finish` is all that the model's own forward does beside decoder and head.

    Asks a twin of the model in which both pass numbers through, so that no weight is touched: the
    model may be on the meta device or sharded.
    """
    hidden = torch.linspace(-60, 60, 24).view(1, 3, 8)
    stand_ins = {parts.decoder: _Decoder(parts.decoder, hidden), parts.head: _Head()}
    twin = object.__new__(type(model))
    twin.__dict__.update(model.__dict__)
    twin._modules = {name: stand_ins.get(m, m) for name, m in model._modules.items()}  # type: ignore
    ids = torch.zeros(1, 3, dtype=torch.int64)
    with torch.no_grad():
        try:
            logits = type(model).forward(twin, input_ids=ids).logits
        except Exception:  # it does something that cannot be seen through
            return False
    return logits.shape == hidden.shape and torch.allclose(logits, parts.finish(hidden))


def _at_least_float32(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()
