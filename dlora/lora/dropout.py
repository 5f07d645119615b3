"""Dropout masks that depend on the sample, not on the process that happens to compute it.

The mask of one sequence at one adapter is drawn from a generator seeded with (seed, step, sequence
id, layer). So it is the same on 1 and on 8 ranks, under any accumulation, after a resume, and when
activation checkpointing runs the forward pass a second time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SampleKeys:
    """Identity of the rows of one micro-batch [rows, tokens]: `lengths` excludes padding."""

    seed: int
    step: int
    ids: Sequence[int]
    lengths: Sequence[int]


class DropoutStream:
    """Shared by all adapters of a model: where their masks come from.

    Without keys (a training loop that knows nothing of them) masks come from torch's global
    generator, as `torch.nn.Dropout` does.
    """

    def __init__(self) -> None:
        self._keys: SampleKeys | None = None
        self._positions: Tensor | None = None

    @contextmanager
    def keyed(self, keys: SampleKeys) -> Iterator[None]:
        """Draw masks from `keys`; open for forward *and* backward, which may recompute."""
        previous, self._keys = self._keys, keys
        try:
            yield
        finally:
            self._keys = previous

    @contextmanager
    def at(self, positions: Tensor) -> Iterator[None]:
        """Inside, x is not the whole grid but its tokens at `positions` [T, 2]: (row, token)."""
        previous, self._positions = self._positions, positions
        try:
            yield
        finally:
            self._positions = previous

    def keep_mask(self, x: Tensor, p: float, layer: str) -> Tensor:
        """A bool mask shaped like x, True with probability 1 − p.

        Args:
            x: [rows, tokens, n] or [rows·tokens, n], rows in the order of the keys; or anything
                else (an image, say), of which no element belongs to a token.
        """
        if self._keys is None:
            return torch.rand(x.shape, device=x.device) >= p
        keys = self._keys
        if not keys.ids:  # a pass of weight zero, made to keep in step with other ranks
            return torch.ones(x.shape, dtype=torch.bool, device=x.device)
        if self._positions is not None:
            return _picked_mask(x, p, layer, keys, self._positions)
        rows, features = len(keys.ids), x.shape[-1]
        tokens, rest = divmod(x.numel() // features, rows)
        if rest or tokens < max(keys.lengths) or x.ndim > 3:
            # An input that is not a [rows, tokens] grid (a mixture-of-experts branch, say)
            # cannot be split by sequence: one stream for all of it, still exact on recomputation.
            generator = _generator(x.device, keys.seed, keys.step, tuple(keys.ids), layer)
            return torch.rand(x.shape, device=x.device, generator=generator) >= p
        keep = torch.ones(rows, tokens, features, dtype=torch.bool, device=x.device)
        for row, length in enumerate(keys.lengths):
            keep[row, :length] = _sequence_mask(x, p, layer, keys, row)
        return keep.view(x.shape)


def _picked_mask(x: Tensor, p: float, layer: str, keys: SampleKeys, positions: Tensor) -> Tensor:
    row_T, token_T = positions.unbind(1)
    keep = torch.ones(x.shape, dtype=torch.bool, device=x.device)
    for row in row_T.unique().tolist():
        here = row_T == row
        keep[here] = _sequence_mask(x, p, layer, keys, row)[token_T[here]]
    return keep


def _sequence_mask(x: Tensor, p: float, layer: str, keys: SampleKeys, row: int) -> Tensor:
    """The mask [length, n] of one sequence, wherever it is in the batch."""
    generator = _generator(x.device, keys.seed, keys.step, keys.ids[row], layer)
    return torch.rand(keys.lengths[row], x.shape[-1], device=x.device, generator=generator) >= p


def seed_of(*key: object) -> int:
    """63 bits that depend on all of `key`, the same in every process."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _generator(device: torch.device, *key: object) -> torch.Generator:
    return torch.Generator(device).manual_seed(seed_of(*key))
