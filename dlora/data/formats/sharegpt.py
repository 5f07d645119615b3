"""ShareGPT's turns."""

from typing import Any

from dlora.data.formats.record import Conversation, checked, system, turn, turns


class ShareGpt:
    """{"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", ...}, ...]}"""

    name = "sharegpt"

    @staticmethod
    def read(record: dict[str, Any]) -> Conversation:
        """The turns; a "system" text beside them, where there is one, is the first message."""
        messages = [
            turn(message, f"conversations[{i}]", "from", "value")
            for i, message in enumerate(turns(record, "conversations"))
        ]
        return system(record) + checked(messages, "conversations", "from 'gpt'")
