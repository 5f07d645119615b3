"""Finding and reading what `data.train` and `data.eval` name: JSONL files.

Every error is a UsageError of one line: `key: file:line: what is wrong, what is expected`. One of
a single record goes to `Faults`, which stops at it or counts it; any other is raised.
"""

import glob
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from dlora.data.builtin import NAMES, PREFIX, builtin_records
from dlora.errors import UsageError

LONGEST_LINE = 16 << 20  # bytes; longer than any training text, and a line is read whole
PIECE = 1 << 20


@dataclass(frozen=True, slots=True)
class Record:
    """A JSON object and its place, such as "data.train: chats.jsonl:12"."""

    value: dict[str, Any]
    where: str


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


def read_records(
    source: str | Sequence[str], key: str, faults: Faults | None = None
) -> Iterator[Record]:
    """The records of a data source, in the order of files and lines.

    Args:
        source: a file, a glob, a list of either, or "builtin:docstrings[-heldout]".
        key: the configuration's name for it, put in front of every error.
        faults: collects the errors of single lines; by default they are raised.

    Raises:
        UsageError: the source does not exist, is empty or is not JSONL in UTF-8.
    """
    faults = faults or Faults()
    if isinstance(source, str) and source.startswith(PREFIX):
        name = source.removeprefix(PREFIX)
        if name not in NAMES:
            known = " or ".join(PREFIX + known for known in NAMES)
            raise UsageError(f"{key}: unknown data set {source}; expected {known}")
        for i, value in enumerate(builtin_records(name)):
            yield Record(value, f"{key}: {source}:{i + 1}")
        return
    for path in resolve(source, key):
        yield from _read_file(path, key, faults)


def resolve(source: str | Sequence[str], key: str) -> list[Path]:
    """The files that a source names, in its order; those of one glob are sorted by name.

    Raises:
        UsageError: the list is empty, a glob matches nothing, or a file is missing, is not a file
            or is named twice.
    """
    patterns = [source] if isinstance(source, str) else list(source)
    if not patterns:
        raise UsageError(f"{key} is an empty list; expected at least one file")
    paths: list[Path] = []
    seen: dict[Path, str] = {}
    for pattern in patterns:
        for path in _matches(pattern, key):
            if path.resolve() in seen:
                raise UsageError(
                    f"{key}: {path} is named twice, by {seen[path.resolve()]!r} and by "
                    f"{pattern!r}; name every file once"
                )
            seen[path.resolve()] = pattern
            paths.append(path)
    return paths


def _matches(pattern: str, key: str) -> list[Path]:
    if not isinstance(pattern, str) or not pattern.strip():
        raise UsageError(f"{key}: {pattern!r} is not a file name; expected a path or a glob")
    if pattern.startswith(PREFIX):
        raise UsageError(f"{key}: {pattern} cannot be one of a list; name it alone")
    path = Path(pattern).expanduser()
    if glob.has_magic(pattern) and not path.exists():
        found = sorted(Path(name) for name in glob.glob(str(path), recursive=True))  # noqa: PTH207 - absolute or not
        files = [match for match in found if match.is_file()]
        if not files:
            raise UsageError(f"{key}: no file matches {pattern} (working directory {Path.cwd()})")
        return files
    if path.is_dir():
        raise UsageError(f"{key}: {path} is a directory; expected a file or a glob: {path}/*.jsonl")
    if not path.exists():
        raise UsageError(f"{key}: {path} does not exist (working directory {Path.cwd()})")
    if not path.is_file():
        raise UsageError(f"{key}: {path} is not a regular file; every rank reads it by itself")
    return [path]


def _read_file(path: Path, key: str, faults: Faults) -> Iterator[Record]:
    filled = False
    try:
        with path.open("rb") as file:
            for number, line in enumerate(_lines(file), start=1):
                where = f"{key}: {path}:{number}"
                try:
                    text = _decode(line, where, first=number == 1)
                    if text.strip():
                        filled = True
                        yield Record(_parse(text, where), where)
                except UsageError as error:
                    filled = True
                    faults.add(error)
    except OSError as error:
        raise UsageError(f"{key}: {path}: {error.strerror or error}") from None
    if not filled:
        state = "is an empty file" if path.stat().st_size == 0 else "contains only blank lines"
        raise UsageError(f"{key}: {path} {state}; expected one JSON object per line")


def _lines(file: BinaryIO) -> Iterator[bytes]:
    """The lines of a file; of one that is too long, as much as shows that it is.

    Lines end at "\\n" and nowhere else: JSON strings may contain U+2028 and the like.
    """
    while line := file.readline(LONGEST_LINE + 1):
        yield line
        too_long = len(line) > LONGEST_LINE
        while too_long and line and not line.endswith(b"\n"):  # pass over the rest of it
            line = file.readline(PIECE)


def _decode(line: bytes, where: str, *, first: bool) -> str:
    if len(line) > LONGEST_LINE:
        raise UsageError(
            f"{where}: a line of more than {LONGEST_LINE >> 20} MiB; expected one JSON object per "
            "line, not a whole file of them"
        )
    try:
        return line.decode("utf-8-sig" if first else "utf-8")  # editors on Windows write a BOM
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{where}: not UTF-8 (byte {error.start + 1} of the line is 0x{line[error.start]:02x});"
            " convert the file to UTF-8"
        ) from None


def _parse(text: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise UsageError(
            f"{where}: not JSON ({error.msg} at column {error.colno}); "
            "expected one whole JSON object per line"
        ) from None
    except (RecursionError, ValueError) as error:  # nested too deeply, or an endless number
        raise UsageError(f"{where}: JSON that Python cannot represent ({error})") from None
    if not isinstance(value, dict):
        raise UsageError(
            f"{where}: a JSON {type(value).__name__}, not an object; expected one "
            '{"...": ...} per line'
        )
    return value
