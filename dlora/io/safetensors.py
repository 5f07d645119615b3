"""Reads and writes safetensors files block by block, a tensor of any size in a few megabytes.

The library writes a file from whole tensors and reads it through a memory map. The format is simple
enough to do without: 8 bytes N, little-endian; N bytes of JSON, {key: {dtype, shape,
data_offsets}}; the tensors' bytes back to back, little-endian.

Source: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dlora.errors import UsageError
from dlora.runtime.memory import trim

BLOCK_BYTES = 1 << 20
SHARD_BYTES = 256 * 10**6  # of a model's files
FLOATS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
INTEGERS = {
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
FLOAT_NAMES = {dtype: name for name, dtype in FLOATS.items()}


@dataclass(frozen=True)
class StoredTensor:
    """One tensor in a file.

    Attributes:
        dtype: as the format spells it, `"BF16"`.
        start: of its first byte in the file.
    """

    file: Path
    key: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int

    def blocks(self) -> Iterator[bytearray]:
        """Read its bytes, in order."""
        with self.file.open("rb") as file:
            file.seek(self.start)
            left = self.nbytes
            while left:
                block = bytearray(min(left, BLOCK_BYTES))
                if file.readinto(block) != len(block):
                    raise UsageError(f"{self.file}: ends inside {self.key}")
                left -= len(block)
                yield block

    def rows(self, first: int = 0, last: int | None = None) -> Tensor:
        """Read `tensor[first:last]` of a floating-point tensor, or all of one without dims."""
        count, *row = self.shape or (1,)
        last = count if last is None else last
        numel = math.prod(row)
        shape = (last - first, *row) if self.shape else ()
        return self.elements(first * numel, last * numel).view(shape)

    def elements(self, start: int, stop: int) -> Tensor:
        """Read the elements [start, stop) of the flattened tensor, of `FLOATS` or `INTEGERS`."""
        dtype = FLOATS.get(self.dtype) or INTEGERS[self.dtype]
        block = bytearray((stop - start) * dtype.itemsize)
        with self.file.open("rb") as file:
            file.seek(self.start + start * dtype.itemsize)
            if file.readinto(block) != len(block):
                raise UsageError(f"{self.file}: ends inside {self.key}")
        return torch.frombuffer(block, dtype=dtype) if block else torch.empty(0, dtype=dtype)

    def check_numbers(self) -> None:
        """Raise a `UsageError` unless it is floating-point and all of it is finite in float32."""
        if self.dtype not in FLOATS:
            raise UsageError(f"{self.file}: {self.key} is {self.dtype}, not floating-point")
        count, numel = BLOCK_BYTES // FLOATS[self.dtype].itemsize, math.prod(self.shape)
        for start in range(0, numel, count):
            block = self.elements(start, min(start + count, numel))
            if not block.float().isfinite().all():
                raise UsageError(f"{self.file}: {self.key} contains NaN or infinite values")


def stored_tensors(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a file by key, in the order of their bytes. Only the header is read.

    Raises:
        UsageError: there is no such file, or it is damaged or cut short.
    """
    assert sys.byteorder == "little", "the format is little-endian"
    try:
        with safe_open(path, framework="pt"):
            pass  # the library has now checked the header, and the file's length against it
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
    except FileNotFoundError:
        raise UsageError(f"{path}: file not found") from None
    except (SafetensorError, OSError) as error:
        raise UsageError(f"{path}: is damaged or not a safetensors file: {error}") from None
    header.pop("__metadata__", None)
    found = []
    for key, entry in header.items():
        start, stop = entry["data_offsets"]
        shape = tuple(entry["shape"])
        found.append(StoredTensor(path, key, entry["dtype"], shape, 8 + size + start, stop - start))
    return {tensor.key: tensor for tensor in sorted(found, key=lambda t: t.start)}


@dataclass(frozen=True)
class NewTensor:
    """A tensor to be written; `blocks` computes its bytes, in order, when they are written."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    blocks: Callable[[], Iterator[bytearray | memoryview]]


def new_float_tensor(
    key: str, dtype: torch.dtype, shape: Sequence[int], parts: Callable[[], Iterator[Tensor]]
) -> NewTensor:
    """A `NewTensor` made of tensors of `dtype`, concatenated along its first dim."""
    nbytes = math.prod(shape) * dtype.itemsize
    return NewTensor(key, FLOAT_NAMES[dtype], tuple(shape), nbytes, lambda: map(_bytes_of, parts()))


def write_tensors(
    path: Path,
    tensors: Sequence[NewTensor],
    written: Callable[[int], None],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a file and force it to the disk.

    Args:
        written: called with the number of bytes after every block.
        metadata: in the header, beside the format.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    end = 0
    for tensor in tensors:
        offsets = [end, end := end + tensor.nbytes]
        header[tensor.key] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": offsets,
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # readers map the tensors, which should be aligned
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            before = file.tell()
            for block in tensor.blocks():
                file.write(block)
                written(len(block))
            if file.tell() - before != tensor.nbytes:
                raise AssertionError(f"{tensor.key}: not the number of bytes that was announced")
            trim()  # or the memory of one tensor adds to that of the next
        file.flush()
        os.fsync(file.fileno())


def in_shards(tensors: Sequence[NewTensor]) -> list[list[NewTensor]]:
    """Consecutive tensors, up to `SHARD_BYTES` or one alone."""
    shards: list[list[NewTensor]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.nbytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    return shards


def write_shards(
    folder: Path,
    shards: Sequence[Sequence[NewTensor]],
    written: Callable[[int], None],
    finished: Callable[[str], None],
    stem: str = "model",
) -> None:
    """Write a model's files, and their index where there are several.

    Args:
        written: called with the number of bytes after every block.
        finished: called with the name of every file.
        stem: of the names; of another stem than `model` there is always an index.
    """
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
        name = f"{stem}.safetensors" if len(shards) == 1 else name
        with torch.no_grad():
            write_tensors(folder / name, shard, written)
        finished(name)
        weight_map.update({tensor.key: name for tensor in shard})
    if len(shards) > 1 or stem != "model":
        total = sum(tensor.nbytes for shard in shards for tensor in shard)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def row_blocks(tensor: StoredTensor) -> Iterator[tuple[int, int]]:
    """(first, last) of consecutive slices in the first dim, of about `BLOCK_BYTES` each."""
    count = tensor.shape[0] if tensor.shape else 1
    step = max(1, BLOCK_BYTES * count // max(tensor.nbytes, 1))
    for first in range(0, count, step):
        yield first, min(first + step, count)


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().data
