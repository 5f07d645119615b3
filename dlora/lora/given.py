"""What a compiled graph is given of an adapter, so that one graph serves all blocks and all steps.

A graph holds for the numbers, flags and shapes that it was traced with. Much of an adapter changes:
its rank where AdaLoRA cuts it, its triplets and state, the keys of its dropout. All of this is
computed in front of the graph, as without a compiler, and comes in as tensors of equal shapes:

    A [r, n], B [m, r], E [r, 1]     r: what the graph has; zeros stand in for what has been cut
    tokens [T], layer []             of dropout: hashes of the tokens, and the key of the layer
    μ [m], n [m]                     of DoRA: magnitudes and row norms

so that nothing in a graph differs between layers of the same shape.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dlora.lora.dropout_mask import Mask


@dataclass(frozen=True)
class Given:
    """The tensors above; gradients flow through A, B, E and the magnitudes."""

    A: Tensor
    B: Tensor
    E: Tensor | None
    mask: Mask | None
    magnitude: Tensor | None = None
    norms: Tensor | None = None

    @classmethod
    def of(cls, A: Tensor, B: Tensor, E: Tensor | None, r: int, mask: Mask | None) -> Given:
        """Factors of a rank up to r, at rank r."""
        missing = r - A.shape[0]
        if missing:
            A, B = F.pad(A, (0, 0, 0, missing)), F.pad(B, (0, missing))
            E = None if E is None else F.pad(E, (0, 0, 0, missing))
        return cls(_input(A), _input(B), None if E is None else _input(E), mask)

    def with_rows(self, magnitude: Tensor, norms: Tensor) -> Given:
        """These, and what rescales rows."""
        return replace(self, magnitude=_input(magnitude), norms=_input(norms))

    def mask_of(self, x: Tensor) -> Mask | None:
        """The mask for an input of a layer, which has to be of the tokens that it was made for."""
        # Not `len`, which would tie a graph to one number of tokens.
        if self.mask is not None and x.shape[:-1].numel() != self.mask.tokens.shape[0]:
            raise NotImplementedError("dropout of an input that has other rows than tokens")
        return self.mask


def masked(mask: Mask | None, x: Tensor, drops: bool, p: float, layer: Tensor) -> Mask | None:
    """A layer's mask whose key is a tensor; where it drops, one for a pass without sequences too.

    Args:
        mask: of the layer over x [rows, tokens, …].
        layer: its key, int32 scalar.
    """
    if mask is None:
        if not drops:
            return None
        tokens = torch.zeros(x.shape[:-1].numel(), dtype=torch.int32, device=x.device)
        return Mask(tokens, layer, p)
    # Of a stream without keys all hashes are the layer's own.
    return replace(mask, layer=layer)


class _Alias(torch.autograd.Function):
    """The same memory as another tensor, not as a view of it.

    Of a view a graph keeps where its base begins, and takes a beginning at 0 (what has been cut and
    padded) for another case than one in a flat buffer.
    """

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        place = tensor.storage_offset(), tensor.shape, tensor.stride()
        return tensor.new_empty(0).set_(tensor.untyped_storage(), *place)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


def _input(tensor: Tensor) -> Tensor:
    """An alias with a shape that no graph takes for one that may change."""
    alias: Tensor = _Alias.apply(tensor)
    torch._dynamo.mark_static(alias)
    return alias
