"""Comma- and tab-separated values."""

import csv
from collections.abc import Iterator
from typing import Any

from dlora.data.kinds.compressed import opened
from dlora.data.kinds.jsonl import lines
from dlora.data.kinds.kind import LONGEST_RECORD, Faults, Place, Record, ending, file_digest
from dlora.errors import UsageError


class Csv:
    """Rows under a line of column names (RFC 4180), in UTF-8; of a .tsv, with tabs.

    Cells are texts as they are: nothing is made a number, and "NA" or "null" stay words. An empty
    cell is null, as in pandas and `datasets`. Quoted cells may contain line breaks.
    """

    name = "CSV"
    suffixes = (".csv", ".tsv")

    @staticmethod
    def read(place: Place, faults: Faults) -> Iterator[Record]:
        """The rows; an error names the line where one starts."""
        csv.field_size_limit(LONGEST_RECORD)
        with opened(place.path, str(place)) as file:
            # Bytes that are no UTF-8 become lone surrogates here, and an error of their row below.
            text = (line.decode("utf-8", "surrogateescape") for line in lines(file))
            delimiter = "\t" if ending(place.path) == ".tsv" else ","  # type: ignore[arg-type]
            reader = csv.reader(text, delimiter=delimiter, strict=True)
            names: list[str] | None = None
            while True:
                where = f"{place}:{reader.line_num + 1}"
                try:
                    row = next(reader, None)
                    if row is None:
                        return
                    if names is None:
                        names = _names(row, where)
                    elif row:  # not a blank line
                        yield Record(_record(names, row, where), where, place.part)
                except csv.Error as error:
                    _refuse_header(names, UsageError(f"{where}: not CSV ({error})"), faults)
                except UsageError as error:
                    _refuse_header(names, error, faults)

    @staticmethod
    def digest(place: Place) -> str:
        """Of the bytes and the separator."""
        return f"{file_digest(place.path)} {ending(place.path)}"  # type: ignore[arg-type]


def _refuse_header(names: list[str] | None, error: UsageError, faults: Faults) -> None:
    """Raise the error if it is that of the names, without which there are no records."""
    if names is None:
        raise error from None
    faults.add(error)


def _names(row: list[str], where: str) -> list[str]:
    names = [name.strip() for name in row]
    if names:
        names[0] = names[0].removeprefix("\ufeff").strip()
    _check_text(names, where)
    for name in names:
        if not name or names.count(name) > 1:
            said = f"{name!r} twice" if name else "a column without a name"
            raise UsageError(f"{where}: the first line has {said}; expected one name per column")
    return names


def _record(names: list[str], row: list[str], where: str) -> dict[str, Any]:
    if len(row) != len(names):
        raise UsageError(
            f"{where}: {len(row)} cells, but the first line names {len(names)} columns; a cell "
            'with a comma or a line break needs "quotes"'
        )
    _check_text(row, where)
    return {name: cell or None for name, cell in zip(names, row, strict=True)}


def _check_text(cells: list[str], where: str) -> None:
    try:
        "".join(cells).encode("utf-8")
    except UnicodeEncodeError:
        raise UsageError(f"{where}: not UTF-8; convert the file to UTF-8") from None
