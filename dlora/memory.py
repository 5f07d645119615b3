"""The memory meter: peak bytes of this process since the meter started.

On CUDA it is what the allocator held at most. On a CPU it is private memory (resident and not
shared, which leaves mapped checkpoint files and libraries out) above the value after imports,
sampled by a thread, because Linux keeps no peak of it.
"""

from __future__ import annotations

import ctypes
import os
import threading

import torch

_EVERY_SECONDS = 0.02


class MemoryMeter:
    """Start it after imports and before anything large exists."""

    def __init__(self) -> None:
        self._base = private_bytes()
        self._peak = 0
        if not torch.cuda.is_available():
            threading.Thread(target=self._watch, name="dlora-memory", daemon=True).start()

    def peak(self) -> int:
        """Highest bytes so far."""
        if torch.cuda.is_available():
            return torch.cuda.max_memory_allocated()
        self._sample()
        return self._peak

    def _sample(self) -> None:
        self._peak = max(self._peak, private_bytes() - self._base)

    def _watch(self) -> None:
        pause = threading.Event()
        while not pause.wait(_EVERY_SECONDS):
            self._sample()


def trim() -> None:
    """Hand free heap pages back to the kernel.

    Sequences of ever new lengths fragment glibc's heap, which then grows long after the live
    tensors stopped to. Elsewhere than on glibc it does nothing.
    """
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if malloc_trim is not None:
        malloc_trim(0)


def private_bytes() -> int:
    """Resident bytes of this process that are not backed by a file or shared memory.

    Equals the `Private_Dirty` of smaps_rollup for a process that shares no written pages, at a
    thousandth of its cost. Without /proc it is 0.
    """
    try:
        with open("/proc/self/statm", encoding="ascii") as statm:
            _, resident, shared, *_ = map(int, statm.read().split())
    except OSError:
        return 0
    return (resident - shared) * os.sysconf("SC_PAGE_SIZE")
