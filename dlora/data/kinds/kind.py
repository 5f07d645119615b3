"""What a kind of source is, and what all kinds read with.

A new one is one file of this folder with a class like those beside it. It declares by what it is
recognised: `suffixes` of a file's name, `markers`, of which a directory has one, or `remote`.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

from dlora.data.kinds.compressed import ENDINGS
from dlora.errors import UsageError

LONGEST_RECORD = 16 << 20  # bytes; longer than any training text, and a record is read whole


@dataclass(frozen=True, slots=True)
class Record:
    """A JSON object and its place, such as "data.train: chats.jsonl:12".

    Attributes:
        part: position of the entry of `data.train` that it comes from.
    """

    value: dict[str, Any]
    where: str
    part: int = 0


@dataclass(slots=True)
class Faults:
    """The treatment of records that cannot be used: `data.on_error`.

    skip: leave them out; otherwise the first one ends the run.
    count, first: how many were left out, and what the first one's error says.
    """

    skip: bool = False
    count: int = 0
    first: str = ""

    def add(self, error: UsageError) -> None:
        """Raise the error, or count it."""
        if not self.skip:
            raise error from None
        self.count += 1
        self.first = self.first or str(error)


@dataclass(frozen=True, slots=True)
class Place:
    """A file, directory or data set to read records from.

    Attributes:
        key: the configuration's name of the source, put in front of every error.
        path: as it is found; of the hub, the data set's id.
        kind: a name in KINDS.
        split, subset, revision: what the user chose of a data set that has several.
        part: position of its entry in `data.train`.
    """

    key: str
    path: Path | str
    kind: str
    split: str | None = None
    subset: str | None = None
    revision: str | None = None
    part: int = 0

    def __str__(self) -> str:
        return f"{self.key}: {self.path}"


class Kind(Protocol):
    """A way to store records.

    Attributes:
        name: for errors.
        suffixes: of the names of its files, in small letters.
        markers: a directory is of this kind if it has one of these files.
        takes: which of `split`, `name` and `revision` it understands.
        requires: {package: what pip installs}.
    """

    name: ClassVar[str]

    @staticmethod
    def read(place: Place, faults: Faults) -> Iterator[Record]:
        """The records in their order, one at a time.

        Errors of single records go to `faults`.

        Raises:
            UsageError: the place cannot be read or is not of this kind.
        """

    @staticmethod
    def digest(place: Place) -> str:
        """A text that is equal where the records are equal, whatever the path."""


def file_digest(path: Path | str) -> str:
    """SHA-256 (hex) of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def ending(path: Path) -> str:
    """The last part of a file's name that says what it is: ".csv" of "A.CSV.gz"."""
    name = path.name.lower()
    for compressed in ENDINGS:
        name = name.removesuffix(compressed)
    return Path(name).suffix


def checked_object(value: Any, where: str, expected: str) -> dict[str, Any]:
    """The value, if it is a JSON object.

    Raises:
        UsageError: it is not.
    """
    if not isinstance(value, dict):
        raise UsageError(f"{where}: a JSON {type(value).__name__}, not an object; {expected}")
    return value
