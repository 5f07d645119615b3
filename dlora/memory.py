"""The memory meter: peak bytes of this process since the meter started.

On CUDA it is what the allocator held at most. On a CPU it is private memory (resident and not
shared, which leaves mapped checkpoint files and libraries out) above the value after imports,
sampled by a thread, because Linux keeps no peak of it.

The same thread keeps the C library's heap from holding much more than what is in use. Weights that
come and go between activations that stay leave holes, and the next weight does not fit into them:
glibc's heap has been seen at twice the bytes in use. When a new peak is about to be mostly holes,
they are handed back to the kernel.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable

import torch

_EVERY_SECONDS = 0.02
_HOLES = 32 << 20  # bytes of free heap that are not worth the handing back
_GROWTH = 4 << 20  # of the peak, before it is tried again


class MemoryMeter:
    """Start it after imports and before anything large exists."""

    def __init__(self) -> None:
        self._base = private_bytes()
        self._peak = 0
        self._in_use = _in_use_reader()
        if not torch.cuda.is_available():
            threading.Thread(target=self._watch, name="dlora-memory", daemon=True).start()

    def peak(self) -> int:
        """Highest bytes so far."""
        if torch.cuda.is_available():
            return torch.cuda.max_memory_allocated()
        self._sample()
        return self._peak

    def _sample(self) -> bool:
        """Whether there has never been as much as now."""
        now = private_bytes() - self._base
        is_new, self._peak = now > self._peak, max(self._peak, now)
        return is_new

    def _watch(self) -> None:
        pause = threading.Event()
        beside, tried = self._beside_heap(), 0
        while not pause.wait(_EVERY_SECONDS):
            is_new = self._sample() and self._peak > tried + _GROWTH
            if is_new and self._beside_heap() > beside + _HOLES:
                tried = self._peak
                trim()

    def _beside_heap(self) -> int:
        """Private bytes that the heap has not handed out: its holes, and a rest that is steady."""
        return private_bytes() - self._in_use()


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


class _HeapFigures(ctypes.Structure):
    """`struct mallinfo2` of glibc 2.33 and later."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    ]


def _in_use_reader() -> Callable[[], int]:
    """Reads the bytes that the heap has handed out; as good as all of it where none can tell."""
    mallinfo = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if mallinfo is None:
        return private_bytes
    mallinfo.restype = _HeapFigures

    def in_use() -> int:
        figures = mallinfo()
        return figures.uordblks + figures.hblkhd

    return in_use
