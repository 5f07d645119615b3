"""Codes and scales of packed weights, made of the weights in a base's files, rows by rows.

    file ── rows that hold the bytes asked for, in the base's dtype ── packed ── the bytes

Rows are packed by themselves, so every rank makes what it holds and nothing else, and all of them
together hold what packing the whole weight gives.
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
    """Reads ranges of the flattened parameters of a model of which some weights are packed.

    Args:
        stored: the files, opened for the model before anything was packed.
        model: with packed layers, on the meta device.
        left: what is packed of rows of a weight, where that is not all: (path of the layer, first
            row, rows) → rows.
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
            made = make(self._left(path, row, weights) if self._left else weights).view(-1)
            place = row * size - start  # of the first of these bytes in `out`
            stop = min(place + len(made), out.numel())
            out[max(place, 0) : stop].copy_(made[max(-place, 0) : stop - place])
