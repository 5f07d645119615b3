"""The memory meter: the most bytes that this process used since the meter started.

On CUDA it reports the allocator's peak. On a CPU it reports anonymous memory above the value after
imports. Anonymous memory is what no file backs: clean pages of mapped checkpoint files and of
libraries are page cache, which the kernel may drop at any time, and do not count. Linux records no
peak of it, so a thread samples it.
"""

from __future__ import annotations

import ctypes
import gc
import os
import threading
import weakref
from pathlib import Path

import torch

_SAMPLE_SECONDS = 0.01  # shorter than a forward of one block of any model whose memory matters
_M_MMAP_THRESHOLD = -3  # of glibc's malloc.h
_STATM = Path("/proc/self/statm")


def use_huge_pages() -> None:
    """Let torch ask the kernel for huge pages, unless the user has decided; before it allocates.

    A gathered layer and a matrix of activations are new memory each time, which the kernel clears
    as it is touched: in pages of 2 MiB that takes a third of the time of pages of 4 KiB.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


class MemoryMeter:
    """Start it after imports and before anything large exists."""

    def __init__(self) -> None:
        # Garbage of imports: freed later, it would hide as many bytes of the run.
        gc.collect()
        trim()
        self._start = anonymous_bytes()
        self._peak = self._recent = 0
        if not torch.cuda.is_available() and _STATM.exists():
            threading.Thread(
                target=_sample, args=(weakref.ref(self),), name="dlora-memory", daemon=True
            ).start()

    def peak(self) -> int:
        """Return the most bytes so far."""
        self._look()
        return self._peak

    def recent(self) -> int:
        """Return the most bytes since the last call."""
        self._look()
        recent, self._recent = self._recent, 0
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        return recent

    def now(self) -> int:
        """Return the bytes of this moment."""
        if torch.cuda.is_available():
            return torch.cuda.memory_allocated()
        return anonymous_bytes() - self._start

    def _look(self) -> None:
        if torch.cuda.is_available():
            self._keep(torch.cuda.max_memory_allocated())
        else:
            self._record(anonymous_bytes())

    def _record(self, now: int) -> None:
        self._keep(now - self._start)

    def _keep(self, used: int) -> None:
        self._peak, self._recent = max(self._peak, used), max(self._recent, used)


def _sample(meter: weakref.ref[MemoryMeter]) -> None:
    """Sample until the meter is garbage; the thread alone does not keep it alive."""
    pause = threading.Event()
    with _STATM.open("rb", buffering=0) as statm:
        while not pause.wait(_SAMPLE_SECONDS) and (sampled := meter()) is not None:
            sampled._record(_anonymous(os.pread(statm.fileno(), 256, 0)))
            del sampled


def anonymous_bytes() -> int:
    """Return the resident bytes of this process that neither a file nor shared memory backs.

    They equal `Anonymous` in /proc/self/smaps_rollup, for which the kernel walks every page (some
    ms for some GB); statm costs microseconds. Without /proc it is 0.
    """
    try:
        return _anonymous(_STATM.read_bytes())
    except OSError:
        return 0


def _anonymous(statm: bytes) -> int:
    _, resident, shared, *_ = map(int, statm.split())
    return (resident - shared) * os.sysconf("SC_PAGE_SIZE")


def unmap_large_blocks(nbytes: int = 1 << 20) -> None:
    """Make glibc return every freed block of `nbytes` and more to the kernel at once.

    By itself it raises this limit to 32 MB as blocks are freed. Gathered layers are then on its
    heap, and leave holes between the activations that stay: a run took half as much again as its
    tensors did. Clearing new pages costs some hundredths of a step. Elsewhere it does nothing.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, nbytes)


def trim() -> None:
    """Return free pages of the C library's heap to the kernel; elsewhere than on glibc do nothing.

    glibc by itself returns only the end of its heap. Call it where much was freed.
    """
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if malloc_trim is not None:
        malloc_trim(0)


def trim_after_step(device: torch.device) -> None:
    """`trim`, where a step's tensors were on the heap: not on a GPU, where it would only take time.

    Sequences of new lengths leave new holes: without it a run of 24 steps on a CPU grew to 1.5
    times its tensors' bytes.
    """
    if device.type == "cpu":
        trim()
