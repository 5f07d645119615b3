"""Output head and cross entropy on the positions that carry a target, in chunks.

A full logits tensor has tokens × vocabulary elements, several times over in backward: gigabytes
where the vocabulary has 50,000 to 250,000 entries. Here the head sees only positions with a target,
a few hundred at a time, and the gradient with respect to its input is taken at once, in forward;
only that gradient [targets, hidden] outlives a chunk.

    loss = Σ_i −log softmax(f(W h_i))[t_i]        f: the model's own soft cap or scale of the logits
"""

from __future__ import annotations

import re
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dlora.errors import UsageError
from dlora.lora.layers import CHILD
from dlora.objectives.own_length import OwnLengths
from dlora.objectives.router_loss import install_router_loss

IGNORED = -100
CHUNK_BYTES = {"cpu": 64 << 20}  # of float32 logits at a time, elsewhere CHUNK_BYTES_ELSEWHERE
CHUNK_BYTES_ELSEWHERE = 256 << 20
_WHOLE_TILES = 256  # rows of a chunk are a multiple, where it has so many

Logits = Callable[[Tensor, Tensor], Tensor]


class ChunkedTargetLoss(torch.autograd.Function):
    """Σ cross entropy of `logits(hidden)`; `parameters` are the head's that are trained."""

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


def chunk_rows(vocabulary: int, device: str) -> int:
    """Rows of logits that are computed at a time on a type of device."""
    rows = CHUNK_BYTES.get(device, CHUNK_BYTES_ELSEWHERE) // (4 * vocabulary)
    return max(1, rows if rows < _WHOLE_TILES else rows - rows % _WHOLE_TILES)


def install(model: nn.Module, device: str | None = None) -> None:
    """Let a causal language model compute `model(..., targets=[rows, tokens])` → Σ cross entropy.

    `positions`, if they are known, are the places of the targets: see `target_loss`. `lengths` are
    the tokens of each row without padding, on which some models' positions depend; an auxiliary
    loss of its own is left for `router_loss.whole_loss`.

    Without `targets` the model's own forward runs. The *root's* forward is extended, so that the
    hooks of a sharded base gather and free its weights as usual. The head's forward takes the loss
    as an argument, so that it is called once, with its weight gathered, whatever the chunks.

    Args:
        device: the type of device whose chunks are used; by default where the hidden states are.

    Raises:
        UsageError: the model is no decoder with an output head.
    """
    parts, own_forward = model_parts(model), model.forward
    own_lengths, router = OwnLengths(model), install_router_loss(model)

    def forward(
        self: Any,
        *args: Any,
        targets: Tensor | None = None,
        positions: Tensor | None = None,
        lengths: Sequence[int] | None = None,
        **kwargs: Any,
    ) -> Any:
        own_lengths.set(lengths, needed=targets is not None)
        if targets is None:
            return own_forward(*args, **kwargs)
        asked = router.begin() if router is not None else {}
        with nullcontext() if "position_ids" in kwargs else one_sequence_per_row():
            outputs = parts.decoder(*args, use_cache=False, **asked, **kwargs)
        if asked and router is not None:
            router.compute(outputs, targets.shape, lengths)
        return target_loss(parts, outputs[0], targets, positions, device)

    def head_forward(self: Any, hidden: Tensor, loss: Any = None) -> Tensor:
        return type(self).forward(self, hidden) if loss is None else loss(hidden)

    model.forward = types.MethodType(forward, model)
    parts.head.forward = types.MethodType(head_forward, parts.head)


@contextmanager
def one_sequence_per_row() -> Iterator[None]:
    """Inside, transformers does not look for packed sequences in the positions that it makes.

    It would read a value of each batch, for which the host waits for a GPU.
    """
    masking: Any = sys.modules.get("transformers.masking_utils")
    look = getattr(masking, "find_packed_sequence_indices", None)
    if look is None:
        yield
        return
    masking.find_packed_sequence_indices = lambda positions: None
    try:
        yield
    finally:
        masking.find_packed_sequence_indices = look


def target_loss(
    parts: Parts,
    hidden: Tensor,
    targets: Tensor,
    positions: Tensor | None = None,
    device: str | None = None,
) -> Tensor:
    """Σ cross entropy over the positions with a target, float32 (float64 for a float64 model).

    Without any target the result is 0 with zero gradients, so that ranks stay in step.

    Args:
        hidden: [rows, tokens, H].
        targets: [rows, tokens], −100 where there is none.
        positions: [N, 2], the (row, token) of each target; found, if they are not given, and then
            the host waits for a GPU.
        device: as of `install`.
    """
    if positions is None:
        positions = (targets != IGNORED).nonzero()
    h, t = hidden[tuple(positions.T)], targets[tuple(positions.T)]
    head = parts.head
    vocabulary = getattr(head, "out_features", None) or getattr(head, "nf", 0) or 1 << 16
    chunk = chunk_rows(int(vocabulary), device or hidden.device.type)
    trained = [p for p in head.parameters() if p.requires_grad]
    needs_grad = torch.is_grad_enabled() and (h.requires_grad or bool(trained))

    def loss(rows: Tensor) -> Tensor:
        arguments = (parts.logits, rows, t, positions, chunk, needs_grad, *trained)
        return ChunkedTargetLoss.apply(*arguments)

    return head(h, loss=loss)


# Attributes of a configuration that scale or cap the logits.
_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
_DIVISOR = "logits_scaling"
_DIVIDED = re.compile("granite|minicpm3")  # others multiply by an attribute of that name
_KNOWN = {*_CAPS, _DIVISOR, "logit_scale", "lm_head_multiplier"}
_OTHERWISE = {"prophetnet": "several streams of hidden states"}  # that no attribute shows
_NOT_CAUSAL = {  # (attribute of the configuration that makes it so, what a token then depends on)
    "xlnet": ("", "every token sees all others"),
    "cpmant": ("", "a token sees the padding after it"),
    "doge": ("is_moe", "its router mixes the tokens of a batch"),
}
_ON_LOGITS = re.compile(r"^(?!(attn|moe|router|num|output_router)_).*(logit|lm_head_)")


class Parts:
    """The decoder and the head of a causal language model, and what it does to logits.

    Attributes:
        unknown: the attribute of the configuration that does something to logits that is not known
            here; empty if there is none.
    """

    def __init__(self, model: nn.Module, decoder: nn.Module, head: nn.Module) -> None:
        self.decoder, self.head = decoder, head
        config: Any = getattr(model, "config", None)
        self._cap = next((cap for name in _CAPS if (cap := getattr(config, name, None))), None)
        scale = getattr(model, "logit_scale", None) or 1.0  # Cohere
        scale *= getattr(decoder, "lm_head_multiplier", None) or 1.0  # Falcon-H1
        self._scale = scale / (getattr(config, _DIVISOR, None) or 1.0)  # Granite
        acting = [
            name
            for name, value in vars(config).items()
            if _ON_LOGITS.match(name) and value not in (None, False, True, 0, 1)
        ]
        known = _KNOWN if _DIVIDED.match(config.model_type) else _KNOWN - {_DIVISOR}
        unknown = [name for name in acting if name not in known]
        self.unknown = [*unknown, _OTHERWISE.get(config.model_type, "")][0]

    def logits(self, hidden: Tensor, positions: Tensor) -> Tensor:
        """The head's own forward (adapter included), then the model's scale and soft cap.

        Args:
            hidden: [chunk, H].
            positions: [chunk, 2], the (row, token) of each in the batch.

        Returns:
            [chunk, V].
        """
        stream = getattr(getattr(self.head, CHILD, None), "stream", None)
        with stream.at(positions) if stream is not None else nullcontext():
            return self.finish(type(self.head).forward(self.head, hidden))

    def finish(self, logits: Tensor) -> Tensor:
        """Scale and cap the head's output as the model does."""
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
            f"model.path: {type(model).__name__} is not a causal language model with an output head"
        )
    if getattr(model.config, "is_encoder_decoder", False):
        raise UsageError(f"model.path: {type(model).__name__} is an encoder-decoder model")
    setting, reason = _NOT_CAUSAL.get(model.config.model_type, ("", ""))
    if reason and (not setting or getattr(model.config, setting)):
        raise UsageError(f"model.path: {type(model).__name__} is not causal: {reason}")
    parts = Parts(model, decoder, head)
    others = [
        name
        for name, child in model.named_children()
        if child not in (decoder, head) and any(True for _ in child.parameters())
    ]
    if head not in model.children() or others or parts.unknown:
        raise UsageError(
            f"model.path: {type(model).__name__} does more than decoder, output head and a scale "
            f"or soft cap of the logits ({[*others, parts.unknown][0] or 'its head'}), so its loss "
            "cannot be computed in chunks"
        )
    return parts


def _at_least_float32(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()
