"""The memory meter: peak bytes of this process since the meter started.

On CUDA it is what the allocator held at most. On a CPU it is private memory (resident and not
shared, which leaves mapped checkpoint files and libraries out) above the value after imports,
sampled by a thread, because Linux keeps no peak of it.

The same thread keeps the C library's heap from holding much more than what is in use. Weights that
come and go between activations that stay leave holes, and the next weight does not fit into them:
glibc's heap has been seen at twice the bytes in use. Near the peak, holes are handed back to the
kernel.
"""

from __future__ import annotations

import ctypes
import os
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

HOLES = 1 / 16  # of the peak: fewer bytes are not worth the handing back and taking again
_EVERY_SECONDS = 0.02
_NEAR = 0.95  # of the peak: below it, holes do no harm
_STATM = Path("/proc/self/statm")
_M_MMAP_THRESHOLD = -3


class MemoryMeter:
    """Start it after imports and before anything large exists."""

    def __init__(self) -> None:
        self._base = private_bytes()
        self._peak = 0
        if not torch.cuda.is_available():
            watch = threading.Thread(
                target=_watch, args=(weakref.ref(self),), name="dlora-memory", daemon=True
            )
            watch.start()

    def peak(self) -> int:
        """Highest bytes so far."""
        if torch.cuda.is_available():
            return torch.cuda.max_memory_allocated()
        self._see(private_bytes())
        return self._peak

    def _see(self, private: int) -> float:
        """Take a sample; its part of the peak."""
        now = private - self._base
        self._peak = max(self._peak, now)
        return now / max(self._peak, 1)


def _watch(meter: weakref.ref[MemoryMeter]) -> None:
    """Until nobody has the meter any more."""
    in_use, pause = _heap_reader(), threading.Event()
    if not _STATM.exists():
        return
    with _STATM.open("rb", buffering=0) as statm:

        def private() -> int:
            return _private(os.pread(statm.fileno(), 256, 0))

        def beside_heap() -> int:
            """Holes, and a rest that is steady. The heap may change while it is read."""
            return min(private() - in_use() for _ in range(3))

        steady = beside_heap()
        while not pause.wait(_EVERY_SECONDS) and (watched := meter()) is not None:
            near = watched._see(private()) > _NEAR
            few = HOLES * watched._peak
            del watched
            if near and beside_heap() > steady + few:
                trim()
                steady = max(steady, beside_heap())  # what cannot be handed back


def trim() -> None:
    """Hand free heap pages back to the kernel.

    Sequences of ever new lengths fragment glibc's heap, which then grows long after the live
    tensors stopped to. Elsewhere than on glibc it does nothing.
    """
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if malloc_trim is not None:
        malloc_trim(0)


def trim_before(module: nn.Module) -> None:
    """`trim` whenever `module` is about to run with gradients.

    For an output head: that is when activations are complete and the logits still to come.
    """

    def hook(*_: Any) -> None:
        if torch.is_grad_enabled():
            trim()

    module.register_forward_pre_hook(hook)


def without_holes(nbytes: int = 1 << 20) -> None:
    """From now on, every tensor of `nbytes` and more goes back to the kernel when it is freed.

    Then a peak on the CPU is what is in use and nothing else, at the cost of the kernel's clearing
    of every new page: some tenths of the time of a step.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, nbytes)


def private_bytes() -> int:
    """Resident bytes of this process that are not backed by a file or shared memory.

    Equals the `Private_Dirty` of smaps_rollup for a process that shares no written pages, at a
    thousandth of its cost. Without /proc it is 0.
    """
    try:
        return _private(_STATM.read_bytes())
    except OSError:
        return 0


def _private(statm: bytes) -> int:
    _, resident, shared, *_ = map(int, statm.split())
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


def _heap_reader() -> Callable[[], int]:
    """Reads the bytes that the heap has handed out; all there is where it does not tell."""
    mallinfo = getattr(ctypes.PyDLL(None), "mallinfo2", None)  # too short to let go of the GIL
    if mallinfo is None:
        return private_bytes
    mallinfo.restype = _HeapFigures

    def in_use() -> int:
        figures = mallinfo()
        return figures.uordblks + figures.hblkhd

    return in_use
