"""A text and its label: the class of the text, or what an encoder-decoder model is to write."""

from collections.abc import Mapping
from typing import Any

from dlora.data.formats.record import LabelledText, RecordError, filled


class Labelled:
    """{"text": "...", "label": "..." or 3}, which some of `train.task` read."""

    name = "labelled"
    fields = ("text", "label")
    offered = False  # `train.task` picks it

    @staticmethod
    def read(record: Mapping[str, Any]) -> LabelledText:
        """The two as they are; true and false are 1 and 0."""
        text, label = filled(record, "text"), record.get("label")
        if isinstance(label, float) and label.is_integer():
            label = int(label)  # tables have columns of floats where a cell is empty
        if isinstance(label, float):
            raise RecordError(f"'label' is {label}; expected a name or a whole number")
        return LabelledText(
            text, str(int(label)) if isinstance(label, int) else filled(record, "label")
        )
