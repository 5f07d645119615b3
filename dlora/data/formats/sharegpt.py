"""ShareGPT's turns."""

from typing import Any

from dlora.data.formats.record import Conversation, conversation, system


class ShareGpt:
    """{"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", ...}, ...]}"""

    name = "sharegpt"
    fields = ("conversations", "system")

    @staticmethod
    def read(record: dict[str, Any]) -> Conversation:
        """The turns; a "system" text beside them, where there is one, is the first message."""
        return system(record) + conversation(record, "conversations", "from", "value", "from 'gpt'")
