"""Copies of a GPU's tensors to host memory, beside what the GPU computes.

compute stream   step k │ forward and backward of step k + 1         │ waits │ step k + 1
side stream             └─ slices ─> staging buffer ─> pinned memory ─┘

One staging buffer of a fixed size, so that a snapshot takes no memory that grows with the adapter;
one operation fills it with many small tensors.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.cuda._pin_memory_utils import pin_memory, unpin_memory

STAGING_BYTES = 32 << 20


class DeviceCopies:
    """The side stream of one GPU and its staging buffer."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._staging: dict[torch.dtype, Tensor] = {}
        self._last: torch.cuda.Event | None = None
        self._read: Sequence[Tensor] = ()  # so that what is read is not freed, and used again

    def start(self, tensors: Sequence[Tensor], host: Tensor) -> torch.cuda.Event:
        """Begin to copy tensors of one dtype, end to end, into `host`; returns an event of its end.

        Until `wait_on_device` nothing may be enqueued that changes them.
        """
        compute = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(compute)
        with torch.cuda.stream(self._stream):
            copy_in_pieces(tensors, host, self._buffer(host.dtype))
            self._last = torch.cuda.Event()
            self._last.record(self._stream)
        self._read = [*self._read, *tensors]
        return self._last

    def wait_on_device(self) -> None:
        """What is enqueued from here on runs after the copies; the host does not wait."""
        if self._last is not None:
            torch.cuda.current_stream(self._device).wait_event(self._last)
            self._last, self._read = None, ()

    def _buffer(self, dtype: torch.dtype) -> Tensor:
        if dtype not in self._staging:
            size = STAGING_BYTES // dtype.itemsize
            self._staging[dtype] = torch.empty(size, dtype=dtype, device=self._device)
        return self._staging[dtype]


def copy_now(tensors: Sequence[Tensor], host: Tensor) -> None:
    """Copy tensors of one device and dtype, end to end, into `host`, and wait until they are there.

    From a GPU that is one copy for each `STAGING_BYTES`, whatever the number of tensors.
    """
    if (device := tensors[0].device).type == "cpu":
        torch.cat(list(tensors), out=host)
        return
    size = min(host.numel(), STAGING_BYTES // host.dtype.itemsize)
    staging = torch.empty(size, dtype=host.dtype, device=device)
    copy_in_pieces(tensors, host, staging, waits=True)


def copy_in_pieces(
    tensors: Sequence[Tensor], host: Tensor, staging: Tensor, *, waits: bool = False
) -> None:
    """Copy tensors end to end into `host`, each piece by way of `staging`.

    Args:
        tensors: of one dtype, flat or not.
        host: [their elements], 1-D.
        staging: 1-D, of any size; on the device of the tensors.
        waits: for each piece, until it is there.
    """
    start = 0
    for piece in pieces(tensors, staging.numel()):
        lengths = [part.numel() for part in piece]
        held = staging[: sum(lengths)]
        torch._foreach_copy_(list(held.split(lengths)), piece)
        host[start : start + held.numel()].copy_(held, non_blocking=not waits)
        start += held.numel()


def pieces(tensors: Sequence[Tensor], size: int) -> Iterator[list[Tensor]]:
    """The tensors in order as flat parts, in lists of at most `size` elements."""
    piece, left = list[Tensor](), size
    for tensor in tensors:
        flat = tensor.reshape(-1)
        while flat.numel():
            part, flat = flat[:left], flat[left:]
            piece.append(part)
            left -= part.numel()
            if not left:
                yield piece
                piece, left = [], size
    if piece:
        yield piece


def pinned(size: int, dtype: torch.dtype) -> Tensor:
    """[size] host memory that a GPU writes to directly, of exactly this size.

    `torch.empty(pin_memory=True)` rounds up to a power of two, and keeps what is freed.

    Raises:
        RuntimeError: the system does not let so much memory be pinned.
    """
    memory = torch.empty(size, dtype=dtype)
    if memory.nbytes:
        pin_memory(memory.data_ptr(), memory.nbytes)
        # Of the tensor and not of its storage, which may be freed before its finalizers run.
        weakref.finalize(memory, unpin_memory, memory.data_ptr()).atexit = False
    return memory
