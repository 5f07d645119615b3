"""Messages with a role and a content each, as chat templates take them."""

from typing import Any

from dlora.data.formats.record import Conversation, conversation


class Chat:
    """{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", ...}, ...]}"""

    name = "chat"
    fields = ("messages",)

    @staticmethod
    def read(record: dict[str, Any]) -> Conversation:
        """The messages as they are."""
        return conversation(record, "messages", "role", "content", "role 'assistant'")
