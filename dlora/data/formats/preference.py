"""A prompt with a better and a worse answer: texts, or messages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dlora.data.formats.messages import checked, message, text_of, turns, with_system
from dlora.data.formats.record import (
    AnswerPair,
    Continuation,
    Conversation,
    Message,
    RecordError,
    filled,
    kind_of,
    string,
)

ANSWERS = ("chosen", "rejected")
_SAME = "'chosen' and 'rejected' are the same; expected a better and a worse answer"


class PreferenceFormat:
    """{"prompt": ..., "chosen": ..., "rejected": ...}, all of them texts or lists of messages."""

    name = "preference"
    fields = ("prompt", "chosen", "rejected", "system", "tools", "documents")

    @staticmethod
    def read(record: Mapping[str, Any]) -> AnswerPair:
        """The prompt with either answer.

        Without "prompt" it is what the two have in common: their first messages, or the text up to
        the word in which they differ. A text may answer messages; a text as prompt of messages is
        what the user says first.
        """
        has_messages = any(isinstance(record.get(name), list) for name in ("prompt", *ANSWERS))
        made = _conversations(record) if has_messages else _texts(record)
        if made.chosen == made.rejected:
            raise RecordError(_SAME)
        return made


def _texts(record: Mapping[str, Any]) -> AnswerPair:
    chosen, rejected = filled(record, "chosen"), filled(record, "rejected")
    if "prompt" in record and record["prompt"] is not None:
        prompt = string(record, "prompt")
        return AnswerPair(Continuation(prompt, chosen), Continuation(prompt, rejected))
    if chosen == rejected:
        raise RecordError(_SAME)
    common = _common(chosen, rejected)
    pair = [Continuation(text[:common], text[common:]) for text in (chosen, rejected)]
    for name, one in zip(ANSWERS, pair, strict=True):
        if not one.completion.strip():
            raise RecordError(f"{name!r} is the beginning of the other answer, so it says nothing")
    return AnswerPair(*pair)


def _common(one: str, other: str) -> int:
    """Characters that two texts have in common, up to the blank before the word that differs."""
    shorter = min(len(one), len(other))
    end = next((i for i in range(shorter) if one[i] != other[i]), shorter)
    while end and not one[end - 1].isspace():
        end -= 1
    return len(one[:end].rstrip(" "))


def _conversations(record: Mapping[str, Any]) -> AnswerPair:
    answers = [_answer(record, name) for name in ANSWERS]
    prompt = _prompt(record, answers)
    made = []
    for name, answer in zip(ANSWERS, answers, strict=True):
        asked, said = prompt, answer
        if answer[: len(prompt)] == prompt:
            said = answer[len(prompt) :]
        if not said:
            raise RecordError(f"{name!r} has no answer behind the prompt; expected one")
        asked = [_untrained(turn) if turn["role"] == "assistant" else turn for turn in asked]
        checked(said, name, "role 'assistant'")
        if said[-1]["role"] != "assistant":
            raise RecordError(f"{name!r} ends with role {said[-1]['role']!r}; expected an answer")
        made.append(with_system(record, asked + said))
    return AnswerPair(*made)


def _answer(record: Mapping[str, Any], name: str) -> Conversation:
    if isinstance(record.get(name), str):
        return [{"role": "assistant", "content": filled(record, name)}]
    return [message(turn, f"{name}[{i}]") for i, turn in turns(record, name)]


def _prompt(record: Mapping[str, Any], answers: list[Conversation]) -> Conversation:
    value = record.get("prompt")
    if value is None:
        pairs = enumerate(zip(*answers, strict=False))
        shorter = min(map(len, answers))
        end = next((i for i, (one, other) in pairs if one != other), shorter)
        if end == shorter == max(map(len, answers)):
            raise RecordError(_SAME)
        # The last message of the shorter one is an answer in any case.
        return answers[0][: min(end, shorter - 1)]
    if isinstance(value, list):
        return [message(turn, f"prompt[{i}]") for i, turn in turns(record, "prompt")]
    if not isinstance(value, str):
        raise RecordError(f"'prompt' is {kind_of(value)}; expected a string or a list of messages")
    asked = filled(record, "prompt")
    spoken = [[turn for turn in answer if turn["role"] == "user"] for answer in answers]
    if not any(spoken):
        return [{"role": "user", "content": asked}]
    if all(said and text_of(said[-1]).strip() == asked.strip() for said in spoken):
        return _prompt({}, answers)
    raise RecordError(
        "'prompt' is a text, and the messages of the answers ask something else; expected the "
        "prompt in one place"
    )


def _untrained(turn: Message) -> Message:
    return {**turn, "train": False}
