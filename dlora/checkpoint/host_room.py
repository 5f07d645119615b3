"""Room in host memory for many tensors: all of a device and dtype are parts of one flat tensor.

tensors on a device   a   b   c   …        each of its own memory
in host memory        [ a | b | c | … ]    one tensor, which is copied as a whole
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor

from dlora.checkpoint.device_copy import copy_now

ADAPTER = "adapter"  # the file of what is trained; others are named by their states
Key = tuple[str, str]  # file, name in it
Kind = tuple[torch.device, torch.dtype]
Memory = Callable[[int, torch.dtype, torch.device], Tensor]  # (elements, dtype, source) → 1-D


def pageable(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[size] ordinary host memory, whatever device its content comes from."""
    return torch.empty(size, dtype=dtype, device="cpu")


def copied(tensors: Mapping[Key, Tensor]) -> HostRoom:
    """Room with copies of these tensors, all of them there when it returns."""
    room = HostRoom()
    room.lay_out(tensors)
    for flat, parts in room.parts(tensors):
        copy_now(parts, flat)
    return room


class HostRoom:
    """The flat tensors and their parts.

    Args:
        memory: allocates each of the flat tensors.

    Attributes:
        flat: by the kind of the tensors that it is for.
    """

    def __init__(self, memory: Memory = pageable) -> None:
        self.flat: dict[Kind, Tensor] = {}
        self._memory = memory
        self._layout: list[tuple[Key, torch.Size, Kind]] = []
        self._views: dict[Key, Tensor] = {}

    def lay_out(self, tensors: Mapping[Key, Tensor]) -> None:
        """Make room for these tensors, where there is other room."""
        layout = [(key, t.shape, (t.device, t.dtype)) for key, t in tensors.items()]
        if layout == self._layout:
            return
        sizes: dict[Kind, int] = {}
        places: dict[Key, tuple[Kind, int]] = {}
        for key, shape, kind in layout:
            places[key] = kind, sizes.setdefault(kind, 0)
            sizes[kind] += shape.numel()
        self._layout, self.flat, self._views = [], {}, {}  # free the old before allocating the new
        for (device, dtype), size in sizes.items():
            self.flat[device, dtype] = self._memory(size, dtype, device)
        for key, shape, _ in layout:
            kind, start = places[key]
            self._views[key] = self.flat[kind][start : start + shape.numel()].view(shape)
        self._layout = layout

    def parts(self, tensors: Mapping[Key, Tensor]) -> Iterator[tuple[Tensor, list[Tensor]]]:
        """(flat tensor, the tensors that belong into it, end to end); none without elements."""
        found: dict[Kind, list[Tensor]] = {kind: [] for kind in self.flat}
        for tensor in tensors.values():
            found[tensor.device, tensor.dtype].append(tensor.reshape(-1))
        return ((flat, found[kind]) for kind, flat in self.flat.items() if flat.numel())

    def content(self, files: Iterable[str]) -> dict[str, dict[str, Tensor]]:
        """The parts by file and name."""
        content: dict[str, dict[str, Tensor]] = {file: {} for file in files}
        for (file, name), view in self._views.items():
            content[file][name] = view
        return content
