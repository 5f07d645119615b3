"""Alpaca's instructions."""

from collections.abc import Mapping
from typing import Any

from dlora.data.formats.messages import with_system
from dlora.data.formats.record import (
    Conversation,
    RecordError,
    as_text,
    filled,
    first_of,
    kind_of,
    optional,
)

_QUESTION = ("instruction", "prompt", "question")
_ANSWER = ("output", "response", "completion", "answer")


class Alpaca:
    """{"instruction": "...", "input": "..." (may be missing), "output": "..."}"""

    name = "alpaca"
    fields = (
        "instruction",
        "input",
        "output",
        "system",
        "history",
        "tools",
        "documents",
        "chat_template_kwargs",
    )

    @staticmethod
    def read(record: Mapping[str, Any]) -> Conversation:
        """The user's message is the instruction, then a blank line and the input if there is one.

        A "system" text, where there is one, is the first message; questions and answers of a
        "history" come before the instruction, and are trained on as it is.
        """
        question = filled(record, first_of(record, *_QUESTION))
        if extra := optional(record, "input"):
            question = f"{question}\n\n{extra}"
        answer = filled(record, first_of(record, *_ANSWER))
        pairs = [*_history(record), (question, answer)]
        read = [
            {"role": role, "content": text}
            for pair in pairs
            for role, text in zip(("user", "assistant"), pair, strict=True)
        ]
        return with_system(record, read)


def _history(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """[[question, answer], ...], as in LLaMA-Factory."""
    value = record.get("history")
    if value is None:
        return []
    if not isinstance(value, list):
        raise RecordError(f"'history' is {kind_of(value)}; expected a list of pairs")
    pairs = []
    for i, pair in enumerate(value):
        if not isinstance(pair, list) or len(pair) != 2:
            raise RecordError(f"history[{i}] is no pair; expected a question and an answer")
        asked, said = (as_text(text, f"history[{i}][{k}]") for k, text in enumerate(pair))
        if not said.strip():
            raise RecordError(f"history[{i}][1] is an empty answer; expected some text")
        pairs.append((asked, said))
    return pairs
