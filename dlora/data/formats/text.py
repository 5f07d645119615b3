"""Plain text."""

from typing import Any

from dlora.data.formats.record import filled


class Text:
    """{"text": "..."}: every token is trained on, with an end-of-sequence token behind the last."""

    name = "text"
    fields = ("text",)

    @staticmethod
    def read(record: dict[str, Any]) -> str:
        """The text as it is."""
        return filled(record, "text")
