"""`library.json`, the index of a library of adapters: what it has, and what was done to each.

    base      the one base: path, revision, identity
    shapes    {path of a weight: [m, n]}, of all that is adapted
    adapters  {name: versions, oldest first, and history}

A version's files are an object, `objects/<id>/`, where id is the SHA-256 of {file: its SHA-256}. A
state of the history says which version is active from then on; going back is a state as well, so
nothing is forgotten. The file is replaced whole; readers see the old index or the new one.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dlora.errors import UsageError
from dlora.io.files import read_object, write_atomically
from dlora.library.same_base import Base, base_of_record

FORMAT = 1
INDEX = "library.json"
LONGEST_NAME = 200  # of a file it may be 255, and others are named after it
_NAME = re.compile(rf"[A-Za-z0-9][A-Za-z0-9._-]{{0,{LONGEST_NAME - 1}}}")
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Version:
    """One adapter as it was added.

    Attributes:
        number: from 1.
        files: {name: SHA-256 (hex)}.
        added: time, ISO 8601, UTC.
        base: as the adapter names it.
        parents: what it was made from: {name, version} or {path}, and weight in a mix.
        data: fingerprint of the training data.
    """

    number: int
    files: dict[str, str]
    added: str
    base: dict[str, Any]
    parents: list[dict[str, Any]] = field(default_factory=list)
    data: str | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    tags: list[str] = field(default_factory=list)

    @property
    def object(self) -> str:
        """The name of its object."""
        return hashlib.sha256(json.dumps(self.files, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class State:
    """What was done, when, and the version that is active since; None: the name is removed.

    Attributes:
        to: of a rollback, the place of the state that it went back to.
    """

    action: str
    time: str
    active: int | None
    to: int | None = None


@dataclass
class Entry:
    """A name of the library."""

    versions: list[Version] = field(default_factory=list)
    history: list[State] = field(default_factory=list)

    @property
    def active(self) -> int | None:
        """The version that others read."""
        return self.history[-1].active

    @property
    def present(self) -> int:
        """The place of the state that the last one is: of a rollback, where it went back to."""
        place = len(self.history) - 1
        while (to := self.history[place].to) is not None:
            place = to
        return place

    def version(self, number: int) -> Version | None:
        """One version."""
        return next((version for version in self.versions if version.number == number), None)


@dataclass
class Index:
    """The whole index."""

    base: Base
    shapes: dict[str, list[int]] = field(default_factory=dict)
    adapters: dict[str, Entry] = field(default_factory=dict)

    def write(self, directory: Path) -> None:
        """Replace the file in `directory`."""
        content = {
            "format": FORMAT,
            "base": self.base.record(),
            "shapes": self.shapes,
            "adapters": {name: asdict(entry) for name, entry in self.adapters.items()},
        }
        write_atomically(directory / INDEX, (json.dumps(content, indent=1) + "\n").encode())

    def active(self) -> dict[str, Version]:
        """{name: the version that others read}, without removed names."""
        found = {name: entry.version(entry.active or 0) for name, entry in self.adapters.items()}
        return {name: version for name, version in found.items() if version is not None}

    def objects(self) -> set[str]:
        """The names of all objects."""
        return {v.object for entry in self.adapters.values() for v in entry.versions}


def read_index(directory: Path) -> Index:
    """Read the index in `directory`.

    Raises:
        UsageError: it is damaged, or of a later dlora.
    """
    path = directory / INDEX
    raw = read_object(path)
    if raw.get("format") != FORMAT:
        raise UsageError(f"{path}: has format {raw.get('format')!r}; this dlora reads {FORMAT}")
    try:
        adapters = {name: _entry(entry) for name, entry in raw["adapters"].items()}
        shapes = {str(path): [int(n) for n in shape] for path, shape in raw["shapes"].items()}
        if strange := [name for name in adapters if not is_name(name)]:
            raise ValueError(f"the name {strange[0][:80]!r}")
        return Index(base_of_record(raw["base"]), shapes, adapters)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UsageError(f"{path}: is damaged: {error!r}; nothing was changed") from None


def is_name(name: str) -> bool:
    """Whether an adapter can have this name."""
    return _NAME.fullmatch(name) is not None


def is_plain(name: str) -> bool:
    """Whether `name` can be that of a file or a directory, and of nothing else."""
    return name == Path(name).name and name not in ("", ".", "..")


def _entry(raw: Mapping[str, Any]) -> Entry:
    entry = Entry([Version(**v) for v in raw["versions"]], [State(**s) for s in raw["history"]])
    numbers = [version.number for version in entry.versions]
    if not all(type(n) is int and n > 0 for n in numbers) or numbers != sorted(set(numbers)):
        raise ValueError("its versions")
    for version in entry.versions:
        if wrong := next((field for field, is_right in _checks(version) if not is_right), None):
            raise ValueError(f"{wrong} of version {version.number}")
    for place, state in enumerate(entry.history):
        known = state.active is None or (type(state.active) is int and state.active in numbers)
        back = state.to is None or (type(state.to) is int and 0 <= state.to < place)
        if not (known and back and _are(str, [state.action, state.time])):
            raise ValueError(f"state {place + 1} of its history")
    if not entry.history:
        raise ValueError("its history")
    return entry


def _checks(version: Version) -> Iterator[tuple[str, bool]]:
    """(field, whether it is of its type) of a version that was read."""
    digests = version.files.values()
    is_named = bool(version.files) and all(map(is_plain, version.files))
    yield "files", is_named and all(_DIGEST.fullmatch(digest) for digest in digests)
    yield "base", base_of_record(version.base) is not None
    for parent in version.parents:
        texts = [parent.get(key) for key in ("path", "name") if parent.get(key) is not None]
        numbers = [parent[key] for key in ("version", "weight") if parent.get(key) is not None]
        yield "parents", _are(str, texts) and _are(int | float, numbers)
    yield "metrics", _are(str, version.metrics) and _are(int | float, version.metrics.values())
    yield "tags", isinstance(version.tags, list) and _are(str, version.tags)
    yield "data", version.data is None or isinstance(version.data, str)
    yield "added", isinstance(version.added, str)


def _are(kind: Any, values: Iterable[Any]) -> bool:
    return all(isinstance(value, kind) for value in values)
