"""What stands in a cell of the table, and the comparisons that decide it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

CLOSE = 2e-5  # relative, of float32 losses and norms that are summed in another order


@dataclass(frozen=True)
class Cell:
    """What stands in a cell.

    Attributes:
        mark: `✓`; `refused`: by the command, before a weight is read; `class`: transformers' class
            or PEFT cannot; `✗`: it is wrong.
        reason: in words, where the mark is not `✓`.
    """

    mark: str
    reason: str = ""


YES = Cell("✓")


def alike(ours: Tensor, wanted: Tensor, what: str) -> Cell:
    """Whether two tensors are equal but for the order of sums."""
    if ours.shape != wanted.shape:
        return Cell("✗", f"{what} {list(ours.shape)} instead of {list(wanted.shape)}")
    error = float((ours - wanted).norm() / wanted.norm())
    return YES if error < 10 * CLOSE else Cell("✗", f"{what} differ by {error:.1g}")


def near(loss: float, wanted: float, norm: float = 0.0, wanted_norm: float = 0.0) -> Cell:
    """Whether loss, and gradient norm, are the reference's."""
    for what, one, other in (("loss", loss, wanted), ("gradient norm", norm, wanted_norm)):
        if not math.isclose(one, other, rel_tol=CLOSE if what == "loss" else 20 * CLOSE):
            return Cell("✗", f"{what} {one:.5f} instead of {other:.5f}")
    return YES


def same_modules(ours: Sequence[str], theirs: Sequence[str]) -> Cell:
    """Whether the same modules are adapted."""
    more, fewer = sorted({*ours} - {*theirs}), sorted({*theirs} - {*ours})
    if not more and not fewer:
        return YES
    parts = [f"{len(fewer)} of PEFT's are missing, as {fewer[0]}"] if fewer else []
    parts += [f"{len(more)} are not PEFT's, as {more[0]}"] if more else []
    return Cell("✗", "; ".join(parts))
