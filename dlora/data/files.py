"""Finding and reading what `data.train` and `data.eval` name.

    what the user wrote  ──sources_of──>  Source: a path or glob, its weight, its split
    Source               ──resolve─────>  Place: a file, directory or data set, and its kind
    Place                ──its kind────>  Record after Record (`kinds/`, one file each)

Every error is a UsageError of one line: `key: file:line: what is wrong, what is expected`. One of
a single record goes to `Faults`, which stops at it or counts it; any other is raised.
"""

import glob
import importlib.util
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from dlora.data.builtin import NAMES, PREFIX, builtin_records
from dlora.data.kinds import KINDS, Faults, Place, Record
from dlora.data.kinds.kind import ending
from dlora.errors import UsageError
from dlora.registry import Part, room

# As the configuration has it: a path, a glob or an id, one with its options, or a list of these.
Entry = str | Mapping[str, Any]
Sources = Entry | Sequence[Entry]

_DEFAULT = "JSON lines"  # of a file whose name says nothing
_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")  # owner/name


@dataclass(frozen=True, slots=True)
class Source:
    """An entry of `data.train` or `data.eval`.

    Attributes:
        path: a file, directory or glob, or the id of a data set of the hub.
        weight: how often each of its records is shown in an epoch.
        split, name, revision: of a data set that has several splits, configurations or versions.
    """

    path: str
    weight: float = 1.0
    split: str | None = None
    name: str | None = None
    revision: str | None = None

    @property
    def choices(self) -> dict[str, str]:
        """What is chosen of a data set."""
        named = {"split": self.split, "name": self.name, "revision": self.revision}
        return {option: value for option, value in named.items() if value is not None}


def read_records(source: Sources, key: str, faults: Faults | None = None) -> Iterator[Record]:
    """The records of a data source, in the order of its entries, their files and lines.

    Args:
        source: what `data.train` takes.
        key: the configuration's name for it, put in front of every error.
        faults: collects the errors of single lines; by default they are raised.

    Raises:
        UsageError: the source does not exist, is empty or is not what its name says.
    """
    faults = faults or Faults()
    if is_builtin(source):
        if (name := str(source).removeprefix(PREFIX)) not in NAMES:
            known = " or ".join(PREFIX + known for known in NAMES)
            raise UsageError(f"{key}: unknown data set {source}; expected {known}")
        for i, value in enumerate(builtin_records(name)):
            yield Record(value, f"{key}: {source}:{i + 1}")
        return
    for place in resolve(source, key):
        before, filled = faults.count, False
        for record in KINDS[place.kind].read(place, faults):
            filled = True
            yield record
        if not filled and faults.count == before:
            raise UsageError(f"{place} {_emptiness(place)}")


def is_builtin(source: Sources) -> bool:
    """Whether a source is one of those that every machine has."""
    return isinstance(source, str) and source.startswith(PREFIX)


def _emptiness(place: Place) -> str:
    path = Path(place.path)
    if path.is_file() and path.stat().st_size == 0:
        return "is an empty file; expected one JSON object per line"
    if place.kind == _DEFAULT:
        return "contains only blank lines; expected one JSON object per line"
    return "contains no records"


def sources_of(source: Sources, key: str) -> list[Source]:
    """The entries of a data source, checked without a look at files.

    Raises:
        UsageError: the list is empty, or an entry is not as expected.
    """
    entries = [source] if isinstance(source, str | Mapping) else list(source)
    if not entries:
        raise UsageError(f"{key} is an empty list; expected at least one file")
    made = [_source(entry, key) for entry in entries]
    if key != "data.train" and any(entry.weight != 1 for entry in made):
        raise UsageError(f"{key}: weight cannot act: every held-out record is evaluated once")
    return made


def _source(entry: Any, key: str) -> Source:
    options = dict(entry) if isinstance(entry, Mapping) else {"path": entry}
    known = [field.name for field in fields(Source)]
    for name in options.keys() - set(known):
        raise UsageError(f"{key}: {name!r} is no option of an entry; options: {', '.join(known)}")
    path = options.get("path")
    if not isinstance(path, str) or not path.strip():
        raise UsageError(f"{key}: {path!r} is not a file name; expected a path or a glob")
    if path.startswith(PREFIX):
        raise UsageError(f"{key}: {path} cannot be one of a list; name it alone")
    for name in options.keys() - {"path", "weight"}:
        if not isinstance(options[name], str) or not options[name].strip():
            raise UsageError(f"{key}: {path}: {name} is {options[name]!r}; expected a text")
    try:
        options["weight"] = float(options.get("weight", 1))
    except (TypeError, ValueError):
        options["weight"] = math.nan
    if not 0 < options["weight"] < math.inf:
        raise UsageError(f"{key}: {path}: weight must be a number > 0, got {entry['weight']!r}")
    return Source(**options)


def resolve(source: Sources, key: str) -> list[Place]:
    """The places that a source names, in its order; those of one glob are sorted by name.

    Nothing is opened, and nothing is downloaded.

    Raises:
        UsageError: the list is empty, a glob matches nothing, a file is missing, is of no kind, or
            is named twice, or a package for it is missing.
    """
    places: list[Place] = []
    seen: dict[tuple[Any, ...], str] = {}
    for part, entry in enumerate(sources_of(source, key)):
        for found in _matches(entry.path, key):
            kind, chosen = _kind(found, key), (entry.split, entry.name, entry.revision)
            place = Place(key, found, kind, *chosen, part)
            _check(place, entry)
            where = found.resolve() if isinstance(found, Path) else found
            same = (where, *sorted(entry.choices.items()))
            if same in seen:
                raise UsageError(
                    f"{key}: {found} is named twice, by {seen[same]!r} and by {entry.path!r}; "
                    "name every file once (a weight shows its records more often)"
                )
            seen[same] = entry.path
            places.append(place)
    return places


def _matches(pattern: str, key: str) -> list[Path | str]:
    """The files and directories of a pattern; of an id, itself."""
    path = Path(pattern).expanduser()
    if glob.has_magic(pattern) and not path.exists():
        found = sorted(Path(name) for name in glob.glob(str(path), recursive=True))  # noqa: PTH207 - absolute or not
        matches = [match for match in found if match.is_file() or _kinds_of(match)]
        if not matches:
            raise UsageError(f"{key}: no file matches {pattern} (working directory {Path.cwd()})")
        return list(matches)
    if path.exists():
        return [path]
    if _ID.fullmatch(pattern) and not path.parent.exists() and not _kinds_of(path):
        return [pattern]
    hint = ""
    if "/" not in pattern and not path.suffix:
        hint = "; a data set of the Hugging Face hub is named owner/name"
    raise UsageError(f"{key}: {path} does not exist (working directory {Path.cwd()}{hint})")


def _kinds_of(path: Path) -> list[Part]:
    """The kinds that recognise a file by its name, or a directory by a file in it."""
    parts = list(room("data.kinds").values())
    if path.is_dir():
        return [p for p in parts if any((path / m).is_file() for m in p.says.get("markers", ()))]
    return [part for part in parts if ending(path) in part.says.get("suffixes", ())]


def _kind(found: Path | str, key: str) -> str:
    """The name of the kind of what was found."""
    if isinstance(found, str):
        return next(str(p.name) for p in room("data.kinds").values() if p.says.get("remote"))
    if kinds := _kinds_of(found):
        return str(kinds[0].name)
    if found.is_dir():
        raise UsageError(
            f"{key}: {found} is a directory; expected a file or a glob: {found}/*.jsonl, or a "
            "directory that datasets.save_to_disk wrote"
        )
    if not found.is_file():
        raise UsageError(f"{key}: {found} is not a regular file; every rank reads it by itself")
    return _DEFAULT


def _check(place: Place, entry: Source) -> None:
    part = room("data.kinds")[place.kind]
    for option, value in entry.choices.items():
        if option not in part.says.get("takes", ()):
            raise UsageError(f"{place}: {option}: {value} cannot act: it is {place.kind}")
    for package, install in part.says.get("requires", {}).items():
        if importlib.util.find_spec(package) is None:
            missing = "does not exist here, and as " if part.says.get("remote") else "as "
            raise UsageError(
                f"{place}: {missing}{place.kind} it needs {package}: pip install {install}"
            )
