"""What a data format is, and what all of them read records with.

A new one is one file of this folder with a class like those beside it. Its `read` raises
`RecordError` for whatever it cannot take; the reader puts the file and the line in front. What it
does not read is passed to a chat template that reads it, or counted among the ignored fields.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

# A message has a "role" and a "content" as in transformers, and what else the template may read;
# an answer with "train": False is no target.
Message = dict[str, Any]
Conversation = list[Message]


class RecordError(ValueError):
    """A record does not fit its format; the message says what was found and what was expected."""


@dataclass(frozen=True, slots=True)
class Continuation:
    """A plain text whose beginning, the prompt, is not trained on."""

    prompt: str
    completion: str


@dataclass(frozen=True, slots=True)
class LabelledText:
    """A text and its label; one that is a whole number is written in decimals."""

    text: str
    label: str


@dataclass(frozen=True, slots=True)
class AnswerPair:
    """A better and a worse answer to one prompt, each with the prompt in front of it."""

    chosen: Conversation | Continuation
    rejected: Conversation | Continuation


class RecordFormat(Protocol):
    """A layout of records.

    Attributes:
        name: the value of `data.format`.
        fields: of a record that it reads; `data.columns` names where they are.
    """

    name: ClassVar[str]
    fields: ClassVar[tuple[str, ...]]

    @staticmethod
    def read(
        record: Mapping[str, Any],
    ) -> Conversation | Continuation | LabelledText | AnswerPair | str:
        """The record as a conversation, or as a plain text of which every token is trained on.

        Raises:
            RecordError: the record does not fit.
        """


class Fields(Mapping[str, Any]):
    """The fields of a record, which remember whether they were read."""

    def __init__(self, record: Mapping[str, Any]) -> None:
        self._record = record
        self._unread = dict.fromkeys(record)

    def __getitem__(self, name: str) -> Any:
        value = self._record[name]
        self._unread.pop(name, None)
        return value

    def __contains__(self, name: object) -> bool:
        return name in self._record

    def __iter__(self) -> Iterator[str]:
        return iter(self._record)

    def __len__(self) -> int:
        return len(self._record)

    def peek(self, name: str) -> Any:
        """A value, or None, which does not count as read."""
        return self._record.get(name)

    def rest(self) -> dict[str, Any]:
        """What was not read, without nulls."""
        values = ((name, self._record[name]) for name in self._unread)
        return {name: value for name, value in values if value is not None}


def string(record: Mapping[str, Any], field: str, where: str = "") -> str:
    """The text of a field that has to be there; `where` names the object that it belongs to."""
    value = _field(record, field, where)
    return as_text(value, f"{where}.{field}" if where else repr(field))


def as_text(value: Any, name: str) -> str:
    """A value that has to be a text; `name` is its name in errors."""
    if not isinstance(value, str):
        raise RecordError(f"{name} is {kind_of(value)}; expected a string")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:  # "\ud800" is valid JSON, but no tokenizer takes half a character
        raise RecordError(f"{name} contains half a surrogate pair; expected Unicode text") from None
    return value


def filled(record: Mapping[str, Any], field: str) -> str:
    """The text of a field that has to be there and not blank."""
    value = string(record, field)
    if not value.strip():
        raise RecordError(f"{field!r} is empty; expected some text")
    return value


def optional(record: Mapping[str, Any], field: str) -> str:
    """The field's text; "" where it is missing, null or blank."""
    if record.get(field) is None:
        return ""
    value = string(record, field)
    return value if value.strip() else ""


def first_of(record: Mapping[str, Any], *fields: str) -> str:
    """The first of some spellings of a field that the record has; the first of all if none."""
    return next((f for f in fields if f in record), fields[0])


def _field(record: Mapping[str, Any], field: str, where: str = "") -> Any:
    if field not in record:
        place = f"{where} has" if where else "the record has"
        found = f"{names(record)}" if record else "nothing"
        hint = "" if where else "; see data.format"
        raise RecordError(f"{place} no field {field!r}, only {found}{hint}")
    return record[field]


def names(fields: Mapping[str, Any]) -> str:
    """At most eight names, quoted."""
    shown = [repr(name) for name in list(fields)[:8]]
    return ", ".join(shown) + (", ..." if len(fields) > 8 else "")


def kind_of(value: Any) -> str:
    """What JSON calls the value's type, with its article."""
    if value is None:
        return "null"
    kinds = {bool: "a boolean", str: "a string", list: "a list", dict: "an object"}
    return kinds.get(type(value), "a number")
