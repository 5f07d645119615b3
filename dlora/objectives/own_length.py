"""Rotary frequencies of each sequence by its own length, whatever it shares a batch with.

Two scalings change the frequencies with the number of tokens n: LongRoPE has one set of factors up
to the original length L and another beyond it; dynamic NTK has a base that grows with n beyond L.
transformers takes n of the longest row, padding included, and dynamic NTK keeps the frequencies of
a longer batch for the next one. Here the module computes once for each kind of row,

    LongRoPE    n > L or not                dynamic NTK    max(n, L)

on as many positions as the longest row of the kind has, from where it started. So every row has the
cosines and sines [rows, S, D] that it has alone. Padded positions have zeros. Sequences that share
a row have theirs side by side.
"""

from __future__ import annotations

import types
from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dlora.errors import UsageError

_SCALINGS = {"longrope", "dynamic"}


class OwnLengths:
    """The lengths of the rows that a model computes next, and its rotary modules that ask for them.

    Attributes:
        rows: tokens of each row without padding; None: the modules do what their class does. They
            stay as they are until the next forward pass, since backward may recompute.
        packed: whether they are those of sequences that share one row.
    """

    def __init__(self, model: nn.Module) -> None:
        self.rows: Sequence[int] | None = None
        self.packed = False
        self._modules = list(_rotary_modules(model))
        for module in self._modules:
            module.forward = types.MethodType(_forward, module)
            module.own_lengths = self

    def set(self, rows: Sequence[int] | None, *, needed: bool, packed: bool = False) -> None:
        """Set the lengths of the rows that come next.

        Raises:
            UsageError: they are needed but not given.
        """
        if needed and rows is None and self._modules:
            raise UsageError(
                "model(..., targets=...): this model's rotary positions depend on the length of a "
                "sequence, so it needs lengths=[tokens of each row without padding]"
            )
        self.rows, self.packed = rows, packed


def depends_on_length(model: nn.Module) -> bool:
    """Whether rotary frequencies change with the number of tokens."""
    return any(True for _ in _rotary_modules(model))


def forget_lengths(model: nn.Module) -> None:
    """Let rotary modules start as they do after loading, whatever they computed before."""
    for module in _rotary_modules(model):
        device = next(module.buffers()).device
        x, position = torch.zeros(1, 1, 1, device=device), torch.zeros(1, 1, device=device).long()
        for layer_type in _scalings(module):
            type(module).forward(module, x, position, *_named(layer_type))


def check_scalings(model: Any) -> None:
    """Check that a scaling that depends on the length is computed by a module that is known.

    Raises:
        UsageError: the configuration has one, but code of its own computes it.
    """
    config = model.config.get_text_config()
    settings = [getattr(config, name, None) for name in ("rope_parameters", "rope_scaling")]
    wanted = {*_SCALINGS, "su"} & {name for found in settings for name in _scaling_names(found)}
    if wanted and not depends_on_length(model):
        raise UsageError(
            f"model.path: {type(model).__name__} scales rotary positions by the longest sequence "
            f"of a batch (rope_type: {wanted.pop()}) in code of its own, so that the loss of a "
            "sequence would depend on the others"
        )


def _scaling_names(parameters: Any) -> Iterator[str]:
    if isinstance(parameters, dict):
        for name in ("rope_type", "type"):
            if isinstance(parameters.get(name), str):
                yield parameters[name]
        for nested in parameters.values():
            yield from _scaling_names(nested)


def _rotary_modules(model: nn.Module) -> Iterator[Any]:
    for module in model.modules():
        if _SCALINGS & set(_scalings(module).values()):
            yield module


def _scalings(module: Any) -> dict[str | None, str]:
    """{layer type, None where there is but one: scaling} of a rotary module; {} of others."""
    kind = getattr(module, "rope_type", None)
    if isinstance(kind, str):
        return {None: kind}
    return kind if isinstance(kind, dict) else {}


def _named(layer_type: str | None) -> tuple[str, ...]:
    return () if layer_type is None else (layer_type,)


def _forward(
    self: Any, x: Tensor, position_ids: Tensor, layer_type: str | None = None
) -> Tensor | tuple[Tensor, ...]:
    """`forward` of a rotary module, [rows, S, D] of each of its results."""
    scaling, rows = _scalings(self).get(layer_type), self.own_lengths.rows
    if scaling not in _SCALINGS or not rows:
        return type(self).forward(self, x, position_ids, *_named(layer_type))
    kinds = [_kind(self, scaling, layer_type, n) for n in rows]
    longest = {
        kind: max(n for n, k in zip(rows, kinds, strict=True) if k == kind) for kind in kinds
    }
    if self.own_lengths.packed:
        return _side_by_side(self, x, position_ids, layer_type, kinds, longest)
    made = {kind: _alone(self, x, position_ids, layer_type, n) for kind, n in longest.items()}
    if len(made) == 1:
        return made[kinds[0]]
    several = [made[kind] for kind in kinds]
    if isinstance(several[0], Tensor):
        return torch.cat(several, -3)
    return tuple(torch.cat(parts, -3) for parts in zip(*several, strict=True))


def _side_by_side(
    module: Any,
    x: Tensor,
    positions: Tensor,
    layer_type: str | None,
    kinds: Sequence[Hashable],
    longest: dict[Hashable, int],
) -> Any:
    """[1, S, D] of sequences that share one row, with zeros behind the last."""
    rows, made, start = module.own_lengths.rows, dict[Hashable, Any](), 0
    for n, kind in zip(rows, kinds, strict=True):
        if n == longest[kind] and kind not in made:
            made[kind] = _alone(module, x, positions[..., start : start + n], layer_type, n)
        start += n

    def joined(parts: Sequence[Tensor]) -> Tensor:
        pieces = [part[..., :n, :] for part, n in zip(parts, rows, strict=True)]
        padding = parts[0].new_zeros(*parts[0].shape[:-2], positions.shape[-1] - start, 1)
        return torch.cat([*pieces, padding.expand(*padding.shape[:-1], parts[0].shape[-1])], -2)

    several = [made[kind] for kind in kinds]
    if isinstance(several[0], Tensor):
        return joined(several)
    return tuple(map(joined, zip(*several, strict=True)))


def _kind(module: Any, scaling: str, layer_type: str | None, n: int) -> Hashable:
    """Equal for lengths with equal frequencies."""
    if scaling == "dynamic":
        return max(n, int(module.original_max_seq_len))
    parameters = module.config.rope_parameters
    parameters = parameters if layer_type is None else parameters[layer_type]
    return n > parameters["original_max_position_embeddings"]


def _alone(module: Any, x: Tensor, positions: Tensor, layer_type: str | None, n: int) -> Any:
    """What the class computes for a sequence of n tokens alone, [1, S, D] with zeros after n."""
    own, more = type(module).forward, _named(layer_type)
    padding = positions.shape[-1] - n
    if padding < 0:  # DeepSeek-V4's compressed tokens
        raise UsageError(
            f"model.path: {type(module).__name__} is given positions of other things than tokens, "
            "so rotary scaling by the length of each sequence alone is not known"
        )
    first = positions[..., :1, :]
    own(module, x, first[..., :1], *more)  # a short sequence resets what a longer one left
    made = own(module, x, first[..., :n], *more)

    def padded(part: Tensor) -> Tensor:
        zeros = part.new_zeros(*part.shape[:-2], padding, part.shape[-1])
        return torch.cat([part, zeros], -2)

    return padded(made) if isinstance(made, Tensor) else tuple(map(padded, made))
