"""A JSON array of objects, read piece by piece: a file may be larger than memory."""

import codecs
import json
from collections.abc import Iterator
from typing import Any, BinaryIO

from dlora.data.kinds.compressed import PIECE, opened
from dlora.data.kinds.jsonl import read_lines
from dlora.data.kinds.kind import (
    LONGEST_RECORD,
    Faults,
    Place,
    Record,
    checked_object,
    file_digest,
)
from dlora.errors import UsageError

_SPACES = " \t\r\n"


class JsonArray:
    """`[{...}, {...}]`, in any layout. JSON lines under this name are read as such.

    One object with the records inside it is refused: which of its lists are the records is unclear.
    """

    name = "a JSON array"
    suffixes = (".json",)

    @staticmethod
    def read(place: Place, faults: Faults) -> Iterator[Record]:
        """The elements; an error names the line where one starts, and its number."""
        with opened(place.path, str(place)) as file:
            scanner = _Scanner(file, place)
            is_array = scanner.peek() == "["
            if is_array:
                yield from _elements(scanner, place, faults)
        if is_array:
            return
        with opened(place.path, str(place)) as file:
            _check_first_line(file, place)
        with opened(place.path, str(place)) as file:
            yield from read_lines(file, place, faults)

    @staticmethod
    def digest(place: Place) -> str:
        """Of the bytes."""
        return file_digest(place.path)


def _elements(scanner: "_Scanner", place: Place, faults: Faults) -> Iterator[Record]:
    scanner.take("[")
    number = 0
    while scanner.peek() != "]" or number:
        number += 1
        scanner.peek()
        where = f"{place}:{scanner.line} (record {number})"
        value = scanner.value(where)
        try:
            found = checked_object(value, where, 'expected an array of {"...": ...}')
        except UsageError as error:
            faults.add(error)
        else:
            yield Record(found, where, place.part)
        if scanner.peek() == "]":
            break
        scanner.take(",")
    scanner.take("]")
    if scanner.peek():
        raise UsageError(f"{place}:{scanner.line}: not JSON (more text behind the array's end)")


def _check_first_line(file: BinaryIO, place: Place) -> None:
    """Raise a `UsageError` if the file is one object over several lines."""
    for line in iter(lambda: file.readline(LONGEST_RECORD), b""):
        text = line.decode("utf-8-sig", "replace").strip()
        if not text:
            continue
        try:
            json.loads(text)
        except (ValueError, RecursionError) as error:
            if text.startswith("{") and getattr(error, "pos", 0) >= len(text):
                raise UsageError(
                    f"{place}: one JSON object over several lines; expected an array of records, "
                    "[{...}, ...], or one object per line; write the list of records itself"
                ) from None
        return


class _Scanner:
    """The text of a file, of which only the part that is being read is in memory."""

    def __init__(self, file: BinaryIO, place: Place) -> None:
        self._file, self._place = file, place
        self._decode = codecs.getincrementaldecoder("utf-8-sig")().decode
        self._parse = json.JSONDecoder().raw_decode
        self._text, self._at, self._ended = "", 0, False
        self.line = 1

    def peek(self) -> str:
        """The next character that is no white space; nothing at the end."""
        while True:
            start = self._at
            end = len(self._text)
            while self._at < end and self._text[self._at] in _SPACES:
                self._at += 1
            self.line += self._text.count("\n", start, self._at)
            if self._at < end:
                return self._text[self._at]
            if not self._more(PIECE):
                return ""

    def take(self, wanted: str) -> None:
        """Pass over a character.

        Raises:
            UsageError: another one is next.
        """
        if (found := self.peek()) != wanted:
            said = f"{found!r} where {wanted!r} is expected" if found else "the array does not end"
            raise UsageError(f"{self._place}:{self.line}: not JSON ({said})")
        self._at += 1

    def value(self, where: str) -> Any:
        """The next value, which is read whole.

        Raises:
            UsageError: it is not JSON, or too large.
        """
        while True:
            try:
                found, end = self._parse(self._text, self._at)
            except json.JSONDecodeError as error:
                size = len(self._text) - self._at
                if size > LONGEST_RECORD:
                    said = f"a record of more than {LONGEST_RECORD >> 20} MiB"
                    raise UsageError(f"{where}: {said}, or a quote or bracket too many") from None
                if not self._more(max(size, PIECE)):
                    line = self.line + self._text.count("\n", self._at, error.pos)
                    raise UsageError(f"{self._place}:{line}: not JSON ({error.msg})") from None
            except (RecursionError, ValueError) as error:
                raise UsageError(f"{where}: JSON that Python cannot represent ({error})") from None
            else:
                if end == len(self._text) and self._more(PIECE):
                    continue  # of a number, more digits may follow
                self.line += self._text.count("\n", self._at, end)
                self._at = end
                return found

    def _more(self, size: int) -> bool:
        """Read on; False at the end of the file."""
        if self._ended:
            return False
        piece = self._file.read(size)
        self._ended = not piece
        try:
            text = self._decode(piece, final=self._ended)
        except UnicodeDecodeError as error:
            line = self.line + self._text.count("\n", self._at)
            line += error.object.count(b"\n", 0, error.start)
            raise UsageError(
                f"{self._place}:{line}: not UTF-8; convert the file to UTF-8"
            ) from None
        self._text, self._at = self._text[self._at :] + text, 0
        return not self._ended
