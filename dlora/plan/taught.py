"""What a teacher found likeliest at each target of a data set, in files: `dlora teach`.

teacher.json                  what it is of, and the parts, written last
part-RANK-NUMBER.safetensors  of some sequences, side by side
    sequences  int64 [S]      their ids
    starts     int64 [S + 1]  where the targets of each begin, and the end
    ids        int32 [N, k]   the k likeliest tokens of each target
    log_p      float32 [N, k] log softmax(logits/T) of these, the likeliest first
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from dlora.errors import UsageError
from dlora.io.files import inside, read_object, write_atomically
from dlora.io.safetensors import StoredTensor, stored_tensors

MANIFEST = "teacher.json"
_FORMAT = 1
_PART_BYTES = 64 << 20
_TYPES = {"sequences": "I64", "starts": "I64", "ids": "I32", "log_p": "F32"}


@dataclass(frozen=True)
class About:
    """What the files are of.

    Attributes:
        data: fingerprint of the data set.
        sequences: how many it has.
        teacher: whose tokens these are, for a reader.
    """

    temperature: float
    top_k: int
    vocabulary: int
    data: str
    sequences: int
    teacher: str


class Writer:
    """Writes the parts of one rank, a few megabytes in memory at a time.

    Args:
        directory: that all ranks write into.
    """

    def __init__(self, directory: Path, rank: int) -> None:
        self._directory, self._rank = directory, rank
        self._pending: list[tuple[int, Tensor, Tensor]] = []
        self._bytes = 0
        self.parts: dict[str, str] = {}  # {name: SHA-256}

    def add(self, sequence: int, ids: Tensor, log_p: Tensor) -> None:
        """Add a sequence: int32 and float32 [targets, k]."""
        self._pending.append((sequence, ids, log_p))
        self._bytes += ids.nbytes + log_p.nbytes
        if self._bytes >= _PART_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write what is pending."""
        if not self._pending:
            return
        sequences, ids, log_p = zip(*self._pending, strict=True)
        starts = torch.tensor([0, *map(len, ids)]).cumsum(0)
        tensors = {"sequences": torch.tensor(sequences), "starts": starts}
        content = save(tensors | {"ids": torch.cat(ids), "log_p": torch.cat(log_p)})
        name = f"part-{self._rank:05d}-{len(self.parts):05d}.safetensors"
        write_atomically(self._directory / name, content)
        self.parts[name] = hashlib.sha256(content).hexdigest()
        self._pending, self._bytes = [], 0


def write_manifest(directory: Path, about: About, parts: dict[str, str]) -> None:
    """Write what makes the parts a whole."""
    content = {"format": _FORMAT, **asdict(about), "parts": parts}
    write_atomically(directory / MANIFEST, (json.dumps(content, indent=2) + "\n").encode())


@dataclass(frozen=True)
class Taught:
    """The files of a teacher.

    Attributes:
        identity: of their content.
        places: of each sequence, its part, and where its targets begin and end there.
    """

    directory: Path
    about: About
    identity: str
    parts: list[dict[str, StoredTensor]] = field(repr=False)
    places: dict[int, tuple[int, int, int]] = field(repr=False)

    @classmethod
    def open(cls, directory: Path) -> Taught:
        """Read the headers of a directory that `dlora teach` wrote.

        Raises:
            UsageError: it is damaged or not whole.
        """
        file = inside(directory, MANIFEST)
        content = read_object(file)
        try:
            about = About(**{name: kind(content[name]) for name, kind in _ABOUT.items()})
            names = sorted(content["parts"])
            if content["format"] != _FORMAT:
                raise ValueError(f"its format is {content['format']!r}")
        except (KeyError, TypeError, ValueError) as error:
            raise UsageError(f"{file}: is not what dlora teach writes: {error}") from None
        parts = [_part(inside(directory, name), about.top_k) for name in names]
        places: dict[int, tuple[int, int, int]] = {}
        for number, part in enumerate(parts):
            sequences, starts = (
                part[name].elements(0, part[name].shape[0]).tolist()
                for name in ("sequences", "starts")
            )
            for sequence, start, stop in zip(sequences, starts, starts[1:], strict=False):
                places[sequence] = (number, start, stop)
        if places.keys() != set(range(about.sequences)):
            raise UsageError(
                f"{file}: of {about.sequences} sequences, there are {len(places)} in its parts"
            )
        identity = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
        return cls(directory, about, identity, parts, places)

    def read(self, sequences: Sequence[int]) -> tuple[Tensor, Tensor]:
        """int64 and float32 [targets, k] of sequences, side by side."""
        k = self.about.top_k
        found = [self._of(sequence) for sequence in sequences]
        ids = [one.long() for one, _ in found] or [torch.empty(0, k, dtype=torch.int64)]
        log_p = [one for _, one in found] or [torch.empty(0, k)]
        return torch.cat(ids), torch.cat(log_p)

    def _of(self, sequence: int) -> tuple[Tensor, Tensor]:
        number, start, stop = self.places[sequence]
        part, k = self.parts[number], self.about.top_k
        ids, log_p = (part[n].elements(start * k, stop * k).view(-1, k) for n in ("ids", "log_p"))
        return ids, log_p


_ABOUT: dict[str, Any] = {
    "temperature": float,
    "top_k": int,
    "vocabulary": int,
    "data": str,
    "sequences": int,
    "teacher": str,
}


def _part(file: Path, k: int) -> dict[str, StoredTensor]:
    found = stored_tensors(file)
    kinds = {name: tensor.dtype for name, tensor in found.items()}
    if kinds != _TYPES or any(found[name].shape[1:] != (k,) for name in ("ids", "log_p")):
        raise UsageError(f"{file}: is no part that dlora teach writes")
    return found
