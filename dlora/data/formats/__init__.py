"""Layouts of a JSON record: one file for each, a class with the members of `RecordFormat`."""

from dlora.data.formats.record import Conversation, RecordError, RecordFormat
from dlora.registry import Parts

FORMATS: Parts[RecordFormat] = Parts("data.formats")

__all__ = ["FORMATS", "Conversation", "RecordError", "RecordFormat"]
