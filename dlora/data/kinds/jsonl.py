"""JSON lines."""

import json
from collections.abc import Iterator
from typing import Any, BinaryIO

from dlora.data.kinds.compressed import PIECE, opened
from dlora.data.kinds.kind import (
    LONGEST_RECORD,
    Faults,
    Place,
    Record,
    checked_object,
    file_digest,
)
from dlora.errors import UsageError


class JsonLines:
    """One object a line, in UTF-8. A file whose name says nothing is read as this."""

    name = "JSON lines"
    suffixes = (".jsonl", ".ndjson", ".jsonlines")

    @staticmethod
    def read(place: Place, faults: Faults) -> Iterator[Record]:
        """The objects; blank lines are passed over."""
        with opened(place.path, str(place)) as file:
            yield from read_lines(file, place, faults)

    @staticmethod
    def digest(place: Place) -> str:
        """Of the bytes."""
        return file_digest(place.path)


def read_lines(file: BinaryIO, place: Place, faults: Faults) -> Iterator[Record]:
    """The objects of an open file."""
    for number, line in enumerate(lines(file), start=1):
        where = f"{place}:{number}"
        try:
            text = decoded(line, where, first=number == 1)
            if not text.strip():
                continue
            record = Record(_parse(text, where), where, place.part)
        except UsageError as error:
            faults.add(error)
        else:
            yield record


def lines(file: BinaryIO) -> Iterator[bytes]:
    """The lines of a file; of one that is too long, as much as shows that it is.

    Lines end at "\\n" and nowhere else: JSON strings may contain U+2028 and the like.
    """
    while line := file.readline(LONGEST_RECORD + 1):
        yield line
        too_long = len(line) > LONGEST_RECORD
        while too_long and line and not line.endswith(b"\n"):  # pass over the rest of it
            line = file.readline(PIECE)


def decoded(line: bytes, where: str, *, first: bool) -> str:
    """A line as text.

    Raises:
        UsageError: it is too long, or not UTF-8.
    """
    if len(line) > LONGEST_RECORD:
        raise UsageError(
            f"{where}: a line of more than {LONGEST_RECORD >> 20} MiB; expected one JSON object "
            "per line, not a whole file of them"
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
    return checked_object(value, where, 'expected one {"...": ...} per line')
