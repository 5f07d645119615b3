"""Plain text."""

from collections.abc import Mapping
from typing import Any

from dlora.data.formats.record import Continuation, filled, string


class Text:
    """{"text": "..."}: every token is trained on, with an end-of-sequence token behind the last.

    Of {"prompt": "...", "completion": "..."} only the completion is.
    """

    name = "text"
    fields = ("text", "prompt", "completion")

    @staticmethod
    def read(record: Mapping[str, Any]) -> str | Continuation:
        """The text as it is."""
        if "text" not in record and "prompt" in record and "completion" in record:
            return Continuation(string(record, "prompt"), filled(record, "completion"))
        return filled(record, "text")
