"""Reads packed weights: rows of the base's files are packed as they are read.

    file ── the rows that contain the requested bytes, in the base's dtype ── the device of
            these bytes ── pack ── the bytes

Rows are packed independently of one another, so every rank packs its own rows only, and the ranks
together have the same bytes as if the whole weight had been packed at once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dlora.base.reader import StoredWeights
from dlora.quant.formats import FORMATS
from dlora.quant.linear import CODES, SCALES, is_packed

ROWS_NUMEL = 1 << 20  # weights packed at a time
Left = Callable[[str, int, Tensor], Tensor]


class StoredPackedWeights:
    """Reads ranges of the flattened parameters of a model with packed weights.

    Args:
        stored: the files, opened for the model before its weights were packed.
        model: the packed model, on the meta device.
        left: computes what remains of rows of W0 when the adapters start from a part of it:
            (path of the layer, first row, rows) → rows. None: W0 is packed as it is.
    """

    def __init__(self, stored: StoredWeights, model: nn.Module, left: Left | None = None) -> None:
        self._stored, self._model, self._left = stored, model, left

    def read(self, name: str, start: int, out: Tensor) -> None:
        """Fill `out` [n] with the elements from `start` on of the parameter `name`."""
        path, _, last = name.rpartition(".")
        module = self._model.get_submodule(path)
        if last in (CODES, SCALES) and is_packed(module):
            self._pack(module, path, last, start, out)
        else:
            self._stored.read(name, start, out)

    def _pack(self, module: Any, path: str, part: str, start: int, out: Tensor) -> None:
        packing = module.packing
        fmt, n, source = FORMATS[packing.name], packing.n, f"{path}.weight"
        make = fmt.codes if part == CODES else fmt.scales
        size = fmt.code_bytes(n) if part == CODES else fmt.scale_bytes(n)
        first, last = start // size, -(-(start + out.numel()) // size)
        step = max(1, ROWS_NUMEL // n) if self._stored.is_plain(source) else last - first
        for row in range(first, last, step):
            weights = torch.empty(min(step, last - row), n, dtype=packing.dtype)
            self._stored.read(source, row * n, weights.view(-1))
            weights = weights.to(out.device)  # where packing is fast
            made = make(self._left(path, row, weights) if self._left else weights).view(-1)
            place = row * size - start  # of the first of these bytes in `out`
            stop = min(place + len(made), out.numel())
            out[max(place, 0) : stop].copy_(made[max(-place, 0) : stop - place])
