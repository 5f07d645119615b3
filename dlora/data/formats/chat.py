"""Messages with a role and a content each, as chat templates take them."""

from typing import Any

from dlora.data.formats.record import Conversation, checked, turn, turns


class Chat:
    """{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", ...}, ...]}"""

    name = "chat"

    @staticmethod
    def read(record: dict[str, Any]) -> Conversation:
        """The messages as they are."""
        messages = [
            turn(message, f"messages[{i}]", "role", "content")
            for i, message in enumerate(turns(record, "messages"))
        ]
        return checked(messages, "messages", "role 'assistant'")
