"""A batch that several adapters share: which of its tokens are whose.

    one row (packed)        [ a a a a | b b | c c c c | padding ]
    a row for a sequence    [ a a a . ]
                            [ a a . . ]
                            [ b b b b ]

Flattened, the tokens of an adapter are one range in either case. A layer computes one product with
W0 for all tokens and each adapter's low-rank product for its own; of what is no low-rank sum (DoRA)
each segment apart. So every sequence is computed as it is in a batch of its adapter alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dlora.errors import UsageError
from dlora.lora import functional_segments
from dlora.lora.functional_segments import LowRankPart
from dlora.lora.variants.lora import LoraAdapter
from dlora.quant.linear import Weight, product


class NotByTokenError(UsageError):
    """A layer's input is not the batch token by token, so nobody knows whose tokens it has."""


@dataclass(frozen=True)
class Segment:
    """Tokens [start, stop) of a flattened batch, which the adapters of one name have."""

    name: str
    start: int
    stop: int


@dataclass(frozen=True)
class Segments:
    """The segments of a batch, in their order.

    Attributes:
        rows: of the batch.
        tokens: of a row, padding included.
    """

    parts: tuple[Segment, ...]
    rows: int
    tokens: int

    @property
    def names(self) -> list[str]:
        """Whose they are, each name once."""
        return list(dict.fromkeys(part.name for part in self.parts))

    def linear(self, several: Any, x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
        """The output of a linear layer with adapters of several names."""
        self._check(x.shape[:-1], several.place)
        x_Tn = x.reshape(-1, x.shape[-1])
        acting = [(part, several.find(part.name)) for part in self.parts]
        acting = [(part, child) for part, child in acting if child is not None and child.active]
        if all(_is_low_rank(child) for _, child in acting):
            parts = [_part(part, child, x_Tn) for part, child in acting]
            return functional_segments.linear(x, weight, bias, parts)
        y_Tm = self._apart(
            several,
            x_Tn,
            lambda child, own: child.linear(own, weight, bias),
            lambda own: product(own, weight, bias),
        )
        return y_Tm.view(*x.shape[:-1], y_Tm.shape[1])

    def embedding(
        self, several: Any, ids: Tensor, weight: Tensor, padding_idx: int | None
    ) -> Tensor:
        """The output of an embedding with adapters of several names."""
        self._check(ids.shape, several.place)
        y_Tm = self._apart(
            several,
            ids.reshape(-1),
            lambda child, own: child.embedding(own, weight, padding_idx),
            lambda own: F.embedding(own, weight),
        )
        return y_Tm.view(*ids.shape, y_Tm.shape[1])

    def _apart(
        self,
        several: Any,
        flat: Tensor,
        own: Callable[[Any, Tensor], Tensor],
        base: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """The outputs of all segments, each computed alone, one after the other."""
        outputs, end = [], 0
        for part in self.parts:
            outputs += [base(flat[end : part.start])] if part.start > end else []
            child, tokens = several.find(part.name), flat[part.start : part.stop]
            acts = child is not None and child.active
            outputs.append(own(child, tokens) if acts else base(tokens))
            end = part.stop
        outputs += [base(flat[end:])] if end < len(flat) else []
        return torch.cat(outputs)

    def _check(self, shape: torch.Size, place: str) -> None:
        """Raise a `NotByTokenError` where a layer does not see the batch token by token.

        Rows and tokens may be one dim; tokens in front of rows would be in another order, and so
        may those be that a router sends to an expert, even where it sends all of them.
        """
        flat = len(shape) == 1 and shape.numel() == self.rows * self.tokens
        sizes, here = ([n for n in s if n != 1] for s in (shape, (self.rows, self.tokens)))
        if sizes != here and not flat or flat and _is_in_a_list_of_a_block(place):
            raise NotByTokenError(
                f"adapters: {place.rpartition('.')[0]} gets an input of {_times(shape)} tokens for "
                f"a batch of {_times((self.rows, self.tokens))}, so whose they are is not known; "
                "leave it out of adapter.target_modules, or train one adapter at a time"
            )


def _is_in_a_list_of_a_block(place: str) -> bool:
    """Whether a path has a second index: `layers.3.mlp.experts.2.w1`."""
    return sum(part.isdigit() for part in place.split(".")) > 1


def _times(sizes: Sequence[int]) -> str:
    return " x ".join(map(str, sizes))


def _is_low_rank(child: Any) -> bool:
    """Whether an adapter adds a low-rank product, and computes it as `LoraAdapter` does."""
    return isinstance(child, LoraAdapter) and type(child).linear is LoraAdapter.linear


def _part(part: Segment, child: LoraAdapter, x_Tn: Tensor) -> LowRankPart:
    A, B = child.factors()
    E, mask = child.singular_values(), child.mask(x_Tn[part.start : part.stop])
    how = (A, B, E, child.scaling, mask, child.shared_by_passes)
    return LowRankPart(part.start, part.stop, *how)
