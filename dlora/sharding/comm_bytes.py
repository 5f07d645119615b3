"""Counting the bytes that this rank's collectives send, in ring-equivalent bytes.

A ring all-gather or reduce-scatter over p ranks whose whole tensor has N bytes sends N·(p−1)/p per
rank; an all-reduce sends twice that. The library underneath may use another algorithm: these are
the figures that a plan can state and that do not depend on it.
"""

from __future__ import annotations


def ring_gather_bytes(nbytes: float, ranks: int) -> float:
    """Sent per rank by an all-gather or reduce-scatter of a whole tensor of `nbytes`."""
    return nbytes * (ranks - 1) / ranks


def ring_reduce_bytes(nbytes: float, ranks: int) -> float:
    """Sent per rank by an all-reduce of a tensor of `nbytes`."""
    return 2 * ring_gather_bytes(nbytes, ranks)


class WireCounter:
    """Bytes sent since the last `take()`."""

    def __init__(self) -> None:
        self._sent = 0.0

    def add(self, nbytes: float) -> None:
        """Count bytes that this rank sends."""
        self._sent += nbytes

    def take(self) -> int:
        """Bytes since the last call."""
        sent, self._sent = self._sent, 0.0
        return round(sent)
