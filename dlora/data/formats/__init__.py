"""Layouts of a JSON record: one file for each, a class with the members of `RecordFormat`."""

from collections.abc import Mapping
from typing import Any

from dlora.data.formats.marks import mark_record, refused_whole
from dlora.data.formats.messages import check_trained
from dlora.data.formats.record import (
    AnswerPair,
    Continuation,
    Conversation,
    Fields,
    LabelledText,
    RecordError,
    RecordFormat,
)
from dlora.registry import Parts

FORMATS: Parts[RecordFormat] = Parts("data.formats")

__all__ = [
    "FORMATS",
    "Continuation",
    "Conversation",
    "LabelledText",
    "AnswerPair",
    "RecordError",
    "RecordFormat",
    "read_record",
]


def read_record(
    format: str, record: Mapping[str, Any]
) -> tuple[Conversation | Continuation | LabelledText | AnswerPair | str, dict[str, Any]]:
    """A record as its format reads it, and the fields that the format does not read.

    Raises:
        RecordError: the record does not fit, or has nothing to train on.
    """
    fields = Fields(record)
    content = FORMATS[format].read(fields)
    if isinstance(content, list):
        mark_record(fields, content)
        check_trained(content)
    elif name := refused_whole(fields):
        raise RecordError(f"the record has nothing to train on: {name!r} says so")
    return content, fields.rest()
