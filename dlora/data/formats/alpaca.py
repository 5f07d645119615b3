"""Alpaca's instructions."""

from typing import Any

from dlora.data.formats.record import Conversation, filled, optional, system


class Alpaca:
    """{"instruction": "...", "input": "..." (may be missing), "output": "..."}"""

    name = "alpaca"
    fields = ("instruction", "input", "output", "system")

    @staticmethod
    def read(record: dict[str, Any]) -> Conversation:
        """The user's message is the instruction, then a blank line and the input if there is one.

        A "system" text, where there is one, is the first message.
        """
        question = filled(record, "instruction")
        if extra := optional(record, "input"):
            question = f"{question}\n\n{extra}"
        answer = {"role": "assistant", "content": filled(record, "output")}
        return [*system(record), {"role": "user", "content": question}, answer]
