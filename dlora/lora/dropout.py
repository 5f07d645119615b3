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

    @contextmanager
    def keyed(self, keys: SampleKeys) -> Iterator[None]:
        """Draw masks from `keys`; holds for forward *and* backward, which may recompute."""
        previous, self._keys = self._keys, keys
        try:
            yield
        finally:
            self._keys = previous

    def keep_mask(self, x: Tensor, p: float, layer: str) -> Tensor:
        """A bool mask shaped like x, True with probability 1 − p.

        Args:
            x: [rows, tokens, n] or [rows·tokens, n], rows in the order of the keys.
        """
        if self._keys is None:
            return torch.rand(x.shape, device=x.device) >= p
        keys = self._keys
        rows, features = len(keys.ids), x.shape[-1]
        tokens, rest = divmod(x.numel() // features, max(rows, 1))
        if rest or tokens < max(keys.lengths, default=0):
            # An input that is no [rows, tokens] grid any more (a mixture-of-experts branch, say)
            # cannot be split by sequence: one stream for all of it, still exact on recomputation.
            generator = _generator(x.device, keys.seed, keys.step, tuple(keys.ids), layer)
            return torch.rand(x.shape, device=x.device, generator=generator) >= p
        keep = torch.ones(rows, tokens, features, dtype=torch.bool, device=x.device)
        for row, (sequence, length) in enumerate(zip(keys.ids, keys.lengths, strict=True)):
            generator = _generator(x.device, keys.seed, keys.step, sequence, layer)
            draws = torch.rand(length, features, device=x.device, generator=generator)
            keep[row, :length] = draws >= p
        return keep.view(x.shape)


def _generator(device: torch.device, *key: object) -> torch.Generator:
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little") >> 1)
