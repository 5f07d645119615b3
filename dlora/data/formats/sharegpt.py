"""ShareGPT's turns."""

from collections.abc import Mapping
from typing import Any

from dlora.data.formats.messages import conversation, with_system
from dlora.data.formats.record import Conversation


class ShareGpt:
    """{"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", ...}, ...]}"""

    name = "sharegpt"
    fields = ("conversations", "system", "tools", "documents", "chat_template_kwargs")

    @staticmethod
    def read(record: Mapping[str, Any]) -> Conversation:
        """The turns; a "system" text beside them, where there is one, is the first message."""
        read = conversation(record, "conversations", "from", "value", "from 'gpt'")
        return with_system(record, read)
