"""The output head of a causal language model, and what its class makes of the head's output.

    hidden ── head ── z ── finish ── logits       finish: a scale, a soft cap, mostly nothing

No formula of any class is known here. `finish` runs the class's own forward, with the decoder and
the head replaced by stand-ins, on any rows of z:

    type(model).forward(twin, input_ids)           twin: decoder → zeros, head → z

A trial with random z, when the head is looked for, shows whether that is so: whether the head is
called once, on every position, and each row of logits depends on its own row of z alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dlora.errors import UsageError

_TRIAL = 6  # positions
_WIDE = 60.0  # values of z in a trial: a soft cap bends them
_NOT_CAUSAL = {  # (attribute of the configuration that makes it so, what a token then depends on)
    "xlnet": ("", "every token sees all others"),
    "cpmant": ("", "a token sees the padding after it"),
    "doge": ("is_moe", "its router mixes the tokens of a batch"),
}
_OTHERWISE = {
    "prophetnet": "its loss is that of several streams of hidden states",
    "reformer": "its reversible blocks give gradients only where the embeddings are trained",
}


@dataclass(frozen=True)
class OutputHead:
    """Where a model's logits come from.

    Attributes:
        module: the head.
        finish: z [N, V] → logits [N, V]; None: the logits are not known row by row, so that they
            have to be computed whole, by the class itself.
    """

    module: Any
    finish: Callable[[Tensor], Tensor] | None

    @property
    def vocabulary(self) -> int:
        """The number of logits of a position."""
        head = self.module
        return int(getattr(head, "out_features", None) or getattr(head, "nf", 0) or 1 << 16)


def output_head(model: Any) -> OutputHead:
    """Find the head the way transformers names it.

    Raises:
        UsageError: the model is no causal language model, or its loss is another.
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    kind = type(model).__name__
    if head is None:
        raise UsageError(f"model.path: {kind} is not a causal language model with an output head")
    if getattr(model.config, "is_encoder_decoder", False):
        raise UsageError(f"model.path: {kind} is an encoder-decoder model")
    setting, reason = _NOT_CAUSAL.get(model.config.model_type, ("", ""))
    if reason and (not setting or getattr(model.config, setting)):
        raise UsageError(f"model.path: {kind} is not causal: {reason}")
    if model.config.model_type in _OTHERWISE:
        reason = _OTHERWISE[model.config.model_type]
        raise UsageError(f"model.path: {kind} cannot be trained: {reason}")
    return OutputHead(head, _finish_of(model, head))


def _finish_of(model: Any, head: Any) -> Callable[[Tensor], Tensor] | None:
    own = [child for child in model.children() if any(True for _ in child.parameters())]
    if head not in own or len(own) != 2 or any(True for _ in model.parameters(recurse=False)):
        return None  # layers between the decoder and the head, or after it
    [decoder] = [child for child in own if child is not head]
    z = torch.empty(_TRIAL, OutputHead(head, None).vocabulary)
    z.uniform_(-_WIDE, _WIDE, generator=torch.Generator().manual_seed(0))
    try:
        run = _Finish(model, decoder, head)
        with torch.no_grad():
            logits, some = run(z), run(z[2:4])
            run(z[:, :1])  # what stands for the logits while the loss is computed
    except Exception:  # a class may need anything for its logits
        return None
    if logits.shape != z.shape or not torch.equal(logits[2:4], some):
        return None
    return _nothing if torch.equal(logits, z) else run


def _nothing(z: Tensor) -> Tensor:
    return z


class _Finish:
    """Runs the forward of a model's class, with stand-ins for its decoder and its head."""

    def __init__(self, model: Any, decoder: Any, head: Any) -> None:
        self._width = int(model.config.get_text_config().hidden_size)
        self._decoder, self._head = _Decoder(decoder), _Head()
        self._twin: Any = object.__new__(type(model))
        modules = {decoder: self._decoder, head: self._head}
        own = dict(model.__dict__) | {
            "_modules": {name: modules.get(m, m) for name, m in model._modules.items()}
        }
        own.pop("forward", None)
        self._twin.__dict__.update(own)

    def __call__(self, z: Tensor) -> Tensor:
        """Logits [N, V] of the head's output z [N, V]."""
        self._decoder.hidden = z.new_zeros(1, len(z), self._width)
        self._head.given, self._head.calls = z[None].clone(), 0  # a class may write into it
        ids = torch.zeros(1, len(z), dtype=torch.int64, device=z.device)
        arguments = {"input_ids": ids, **without_cache(self._twin)}
        logits = type(self._twin).forward(self._twin, **arguments).logits
        if self._head.calls != 1:
            raise RuntimeError("the head is not called once, on every position")
        return logits[0]


class _Decoder:
    """Returns a given hidden state, in the place of a decoder and of the modules inside it."""

    def __init__(self, decoder: nn.Module) -> None:
        self._original = decoder
        self.hidden = torch.empty(0)

    def __call__(self, *_: Any, **__: Any) -> _Decoder:
        return self

    @property
    def last_hidden_state(self) -> Tensor:
        return self.hidden

    def __getitem__(self, index: Any) -> Any:
        return (self.hidden,)[index]

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.__dict__["_original"], name, None)
        return self if isinstance(value, nn.Module) else value


class _Head:
    """Returns a given z, in the place of the head."""

    def __init__(self) -> None:
        self.given, self.calls = torch.empty(0), 0
        self.weight = torch.zeros(())

    def __call__(self, hidden: Tensor) -> Tensor:
        self.calls += hidden.shape[:2] == self.given.shape[:2]
        return self.given


def without_cache(model: Any) -> dict[str, bool]:
    """The argument by which a model's forward fills no cache, if it takes it."""
    parameters = inspect.signature(type(model).forward).parameters
    takes = "use_cache" in parameters or any(
        p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()
    )
    return {"use_cache": False} if takes else {}
