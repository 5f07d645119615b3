"""`data.columns`: {field of the format: the column of the records that it is in}."""

from collections.abc import Collection, Mapping
from typing import Any

from dlora.errors import UsageError
from dlora.registry import room


class Columns:
    """Renames the columns of records to what their format reads.

    Args:
        wanted: {field: column}; empty: records stay as they are.
        format: the name of the records' format.

    Raises:
        UsageError: a mapping changes nothing.
    """

    def __init__(self, wanted: Mapping[str, str], format: str) -> None:
        self._wanted, self._unseen = dict(wanted), dict(wanted)
        part = room("data.formats").get(format)
        self._format, self._fields = format, part.says.get("fields", ()) if part else ()
        for field, column in self._wanted.items():
            if field == column:
                raise UsageError(f"data.columns.{field}: it is called {column!r} already")

    def __call__(self, record: dict[str, Any]) -> dict[str, Any]:
        """The record with the names of the format.

        A field that the record had under the format's own name is replaced.
        """
        if not self._wanted:
            return record
        found = {field: c for field, c in self._wanted.items() if c in record}
        for field in found:
            self._unseen.pop(field, None)
        used = set(found.values())
        renamed = {name: value for name, value in record.items() if name not in used}
        return renamed | {field: record[column] for field, column in found.items()}

    def missing(self, record: Mapping[str, Any]) -> str:
        """For an error of a record: the columns that it lacks, if there are any."""
        lacking = [f"{c!r} (data.columns.{f})" for f, c in self._wanted.items() if c not in record]
        return f"; it has no column {' or '.join(lacking)}" if lacking else ""

    def check_read(self, ignored: Collection[str]) -> None:
        """Raise a `UsageError` if nothing reads a field, neither the format nor a chat template.

        Args:
            ignored: fields of records that nothing read.
        """
        for field in self._wanted:
            if field in ignored and field not in self._fields:
                raise UsageError(
                    f"data.columns.{field}: data.format: {self._format} reads no {field!r}; it "
                    f"reads {', '.join(map(repr, self._fields))}"
                )

    def check_seen(self, key: str) -> None:
        """Raise a `UsageError` if no record that was read has one of the columns.

        Args:
            key: "data.train" or "data.eval".
        """
        for field, column in self._unseen.items():
            raise UsageError(f"data.columns.{field}: no record of {key} has a column {column!r}")
