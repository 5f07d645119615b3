"""Messages with a role and a content each, as chat templates take them."""

from collections.abc import Mapping
from typing import Any

from dlora.data.formats.messages import checked, conversation, message, turns, with_system
from dlora.data.formats.record import Conversation, RecordError


class Chat:
    """{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", ...}, ...]}"""

    name = "chat"
    fields = (
        "messages",
        "system",
        "prompt",
        "completion",
        "tools",
        "documents",
        "chat_template_kwargs",
    )

    @staticmethod
    def read(record: Mapping[str, Any]) -> Conversation:
        """The messages as they are; a "system" text beside them is the first one.

        "prompt" and "completion", two lists of messages, are one conversation of which the
        completion alone is trained on.
        """
        if "messages" not in record and isinstance(record.get("prompt"), list):
            return with_system(record, _completed(record))
        read = conversation(record, "messages", "role", "content", "role 'assistant'")
        return with_system(record, read)


def _completed(record: Mapping[str, Any]) -> Conversation:
    asked = [message(turn, f"prompt[{i}]") for i, turn in turns(record, "prompt")]
    answered = [message(turn, f"completion[{i}]") for i, turn in turns(record, "completion")]
    for turn in asked:
        if turn["role"] == "assistant":
            if turn.get("train"):
                raise RecordError("'prompt' has an answer to train on; expected it in 'completion'")
            turn["train"] = False
    return asked + checked(answered, "completion", "role 'assistant'")
