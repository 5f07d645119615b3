"""Dropout masks that depend on the sample, not on the process or the device that computes them.

Each element is a hash, so that nothing is drawn and nothing is stored: backward makes the mask of
forward again, with the same bits on every device.

    of a token     t = mix(key of (seed, step, sequence id) + position in its own sequence · γ)
    of a column    c = mix(column · γ)
    of an element  keep  ⇔  fold(mix(t ⊕ key of the layer) ⊕ c) + 2³¹ ≥ p·2³²  on int32

So a mask is the same on 1 and on 8 ranks, under any accumulation and in any batch, after a resume,
and when activation checkpointing runs the forward pass a second time.

`mix` and `fold` are those of `hashing.py`; `dropout_mask.py` makes and applies the mask.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from dlora.lora.dropout_mask import Mask
from dlora.lora.hashing import counted, mix

KEYED_BY = ("seed", "step", "sequence", "layer", "position", "column")


@dataclass(frozen=True)
class SampleKeys:
    """Identity of the sequences of one micro-batch [rows, tokens].

    Attributes:
        lengths: their tokens, without padding.
        row: tokens of the one row that all of them share, padding included; 0: each has its own.
    """

    seed: int
    step: int
    ids: Sequence[int]
    lengths: Sequence[int]
    row: int = 0


@dataclass(frozen=True)
class _Grid:
    """Keys as tensors, which are made outside of what torch may compile.

    Attributes:
        rows: int32 [rows], the key of each sequence; `whole` [1] that of all of them.
        longest: tokens of the longest, or of the row that they share.
        made: {(device, tokens): hashes [rows, tokens]}, once for all layers.
        shared: int32 [1, tokens], what is hashed of each token of a row that all share.
        ends: int64 [rows], where the tokens of each row end and its padding begins.
    """

    rows: Tensor
    whole: Tensor
    longest: int
    made: dict[tuple[torch.device, int], Tensor]
    ends: Tensor
    shared: Tensor | None = None

    @classmethod
    def of(cls, keys: SampleKeys) -> _Grid:
        rows = [key_of(keys.seed, keys.step, id) for id in keys.ids]
        whole = [key_of(keys.seed, keys.step, *keys.ids)]
        tensors = [torch.tensor(found, dtype=torch.int32) for found in (rows, whole)]
        if not keys.row:
            ends = torch.tensor(keys.lengths, dtype=torch.int64)
            return cls(tensors[0], tensors[1], max(keys.lengths, default=0), {}, ends)
        parts = [
            _hashed(row, n)[0] for row, n in zip(tensors[0][:, None], keys.lengths, strict=True)
        ]
        shared = torch.zeros(1, keys.row, dtype=torch.int32)
        shared[0, : sum(keys.lengths)] = torch.cat(parts)
        return cls(tensors[0], tensors[1], keys.row, {}, torch.tensor([sum(keys.lengths)]), shared)

    def hashes(self, device: torch.device, tokens: int) -> Tensor:
        """int32 [rows, tokens], a hash of each token; one row of them where all share it."""
        if torch.compiler.is_compiling():
            if self.shared is not None:
                return mix(self.shared.to(device))
            return _tokens(self.rows.to(device), tokens)
        if (device, tokens) not in self.made:
            made = _tokens(self.rows, tokens) if self.shared is None else mix(self.shared)
            self.made[device, tokens] = made.to(device, non_blocking=True)
        return self.made[device, tokens]


class DropoutStream:
    """Shared by all adapters of a model: where their masks come from.

    Without keys (a training loop that knows nothing of them) a token's hash comes from torch's
    global generator, so that masks follow `torch.manual_seed` as those of `torch.nn.Dropout` do.

    Attributes:
        announce: gets the line that says, once, that a layer's input is not laid out by sequence.
        attended: without keys, the attention mask [rows, tokens] of the pass, or None.
    """

    announce: Callable[[str], None] = staticmethod(warnings.warn)
    attended: Tensor | None = None

    def __init__(self) -> None:
        self._grid: _Grid | None = None
        self._positions: Tensor | None = None
        self._announced = False

    @contextmanager
    def keyed(self, keys: SampleKeys | None) -> Iterator[None]:
        """Make masks from `keys`; open for forward *and* backward, which may recompute."""
        previous, self._grid = self._grid, None if keys is None else _Grid.of(keys)
        try:
            yield
        finally:
            self._grid = previous

    @contextmanager
    def at(self, positions: Tensor) -> Iterator[None]:
        """Inside, x is not the whole grid but its tokens at `positions` [T, 2]: (row, token)."""
        previous, self._positions = self._positions, positions
        try:
            yield
        finally:
            self._positions = previous

    def mask(self, x: Tensor, p: float, layer: int) -> Mask | None:
        """The mask of x as [T, n], n its last dim; None for keys without sequences.

        Args:
            x: [rows, tokens, n], [rows·tokens, n] or [rows, …, n] (an image, say), rows in the
                order of the keys; or anything else, of which nothing belongs to a sequence.
            layer: `key_of` its path.
        """
        total, grid = x.shape[:-1].numel(), self._grid
        if grid is None:
            size, dtype = (total,), torch.int32
            hashes_T = torch.randint(-(2**31), 2**31, size, dtype=dtype, device=x.device)
            return Mask(hashes_T, 0, p)
        rows = len(grid.rows)
        if not rows:  # a pass of weight zero, made to keep in step with other ranks
            return None
        if self._positions is not None:
            rows_T, tokens_T = self._positions.unbind(1)
            return Mask(grid.hashes(x.device, grid.longest)[rows_T, tokens_T], layer, p)
        if grid.shared is not None:
            rows = 1
        tokens, rest = divmod(total, rows)
        if x.ndim == 2 and total == rows:  # a vector of each sequence, as of a pooler
            return Mask(grid.hashes(x.device, 1).view(-1), layer, p)
        if grid.shared is None and x.ndim > 3 and x.shape[0] == rows:
            return Mask(grid.hashes(x.device, tokens).view(-1), layer, p)
        unlike = grid.shared is not None and tokens != grid.longest
        if rest or tokens < grid.longest or unlike or x.ndim > 3:
            # An input that is not a [rows, tokens] grid (a mixture-of-experts branch, say)
            # cannot be split by sequence: one stream for all of it, still exact on recomputation.
            self._announce(x)
            return Mask(_tokens(grid.whole.to(x.device), total).view(-1), layer, p)
        return Mask(grid.hashes(x.device, tokens).view(-1), layer, p)

    def counted(self, x: Tensor) -> Tensor | None:
        """bool [T], False for the padding in x [..., n]; None where nothing is known to be padding.

        That is so of an input that is not laid out by sequence: all of its tokens count.
        """
        total, grid = x.shape[:-1].numel(), self._grid
        if self._positions is not None:
            return None
        if grid is None:
            mask = self.attended
            return None if mask is None or mask.numel() != total else mask.reshape(-1).bool()
        if not len(grid.rows):  # a pass of weight zero: all of it is padding
            return torch.zeros(total, dtype=torch.bool, device=x.device)
        tokens, rest = divmod(total, len(grid.ends))
        if rest or tokens < grid.longest or x.ndim > 3:
            return None
        ends = grid.ends.to(x.device, non_blocking=True)
        return (torch.arange(tokens, device=x.device) < ends[:, None]).view(-1)

    def _announce(self, x: Tensor) -> None:
        if not self._announced and not torch.compiler.is_compiling():
            self._announced = True
            self.announce(
                f"lora_dropout: an adapted layer gets an input {list(x.shape)} that is not laid out"
                " by sequence (tokens routed to an expert, say): what its mask drops depends on"
                " which sequences share a micro-batch"
            )


def _tokens(rows: Tensor, tokens: int) -> Tensor:
    """int32 [rows, tokens]: a hash of each token from its row's key and its position."""
    return mix(_hashed(rows, tokens))


def _hashed(rows: Tensor, tokens: int) -> Tensor:
    """int32 [rows, tokens], what is hashed of each token."""
    return rows[:, None] + counted(tokens, rows.device)


def key_of(*key: object) -> int:
    """32 bits that depend on all of `key`, as an int32."""
    return seed_of(*key) % 2**32 - 2**31


def seed_of(*key: object) -> int:
    """63 bits that depend on all of `key`, the same in every process."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
