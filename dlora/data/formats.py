"""From a JSON record to a conversation or a plain text: one function per `data.format`.

To add a format, write a function from the record to a Conversation or a str and register it:

    @record_format("qa")
    def qa(record: dict[str, Any]) -> Conversation:
        return [_message("user", _text(record, "q")), _message("assistant", _answer(record, "a"))]

It raises RecordError for whatever it cannot take; the reader puts the file and the line in front.
"""

from collections.abc import Callable, Mapping
from typing import Any

Conversation = list[dict[str, str]]  # [{"role": "user", "content": "..."}, ...], as in transformers
Format = Callable[[dict[str, Any]], Conversation | str]

ROLES = ("system", "user", "assistant", "tool")
_SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "tool": "tool",
}
# Parts of a message that change what should be learnt: dropping them would train something else.
_NOT_BUILT = ("tool_calls", "function_call", "reasoning_content", "weight")

FORMATS: dict[str, Format] = {}


class RecordError(ValueError):
    """A record does not fit its format; the message says what was found and what was expected."""


def record_format(name: str) -> Callable[[Format], Format]:
    """Registers the decorated function as `data.format: <name>`."""

    def register(function: Format) -> Format:
        FORMATS[name] = function
        return function

    return register


@record_format("chat")
def chat(record: dict[str, Any]) -> Conversation:
    """{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", ...}, ...]}"""
    turns = _turns(record, "messages")
    return _checked(
        [_turn(turn, f"messages[{i}]", "role", "content") for i, turn in enumerate(turns)],
        "messages",
        "role 'assistant'",
    )


@record_format("sharegpt")
def sharegpt(record: dict[str, Any]) -> Conversation:
    """{"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", ...}, ...]}

    A "system" text beside the turns, as some data sets have it, becomes the first message.
    """
    turns = _turns(record, "conversations")
    names = [_turn(turn, f"conversations[{i}]", "from", "value") for i, turn in enumerate(turns)]
    return _system(record) + _checked(names, "conversations", "from 'gpt'")


@record_format("alpaca")
def alpaca(record: dict[str, Any]) -> Conversation:
    """{"instruction": "...", "input": "..." (may be missing), "output": "..."}

    The user's message is the instruction, then a blank line and the input if there is one.
    """
    question = _filled(record, "instruction")
    if extra := _optional(record, "input"):
        question = f"{question}\n\n{extra}"
    answer = {"role": "assistant", "content": _filled(record, "output")}
    return [*_system(record), {"role": "user", "content": question}, answer]


@record_format("text")
def text(record: dict[str, Any]) -> str:
    """{"text": "..."}: trained on every token, with an end-of-sequence token behind the last."""
    return _filled(record, "text")


def _turns(record: dict[str, Any], field: str) -> list[Any]:
    value = _field(record, field)
    if not isinstance(value, list):
        raise RecordError(f"{field!r} is {_kind(value)}; expected a list of objects")
    if not value:
        raise RecordError(f"{field!r} is empty; expected at least a question and an answer")
    return value


def _turn(turn: Any, where: str, role_field: str, text_field: str) -> dict[str, str]:
    """One message of a conversation; `where` names it in errors, such as "messages[2]"."""
    if not isinstance(turn, dict):
        raise RecordError(
            f"{where} is {_kind(turn)}; expected an object with {role_field!r} and {text_field!r}"
        )
    roles = _SHAREGPT_ROLES if role_field == "from" else {role: role for role in ROLES}
    name = _string(turn, role_field, where)
    if name not in roles:
        raise RecordError(f"{where} has {role_field} {name!r}; expected one of {_names(roles)}")
    for field in _NOT_BUILT:
        if turn.get(field) is not None:
            raise RecordError(f"{where} has {field!r}, which is not supported; expected only text")
    return {"role": roles[name], "content": _string(turn, text_field, where)}


def _checked(conversation: Conversation, field: str, wanted: str) -> Conversation:
    """The conversation, once it is known to have an answer and no empty one."""
    answers = [i for i, turn in enumerate(conversation) if turn["role"] == "assistant"]
    if not answers:
        raise RecordError(f"{field!r} has nothing to train on; expected a message with {wanted}")
    for i in answers:
        if not conversation[i]["content"].strip():
            raise RecordError(f"{field}[{i}] is an empty answer; expected some text")
    return conversation


def _system(record: dict[str, Any]) -> Conversation:
    prompt = _optional(record, "system")
    return [{"role": "system", "content": prompt}] if prompt else []


def _field(record: Mapping[str, Any], field: str, where: str = "") -> Any:
    if field not in record:
        place = f"{where} has" if where else "the record has"
        found = f"{_names(record)}" if record else "nothing"
        hint = "" if where else "; see data.format"
        raise RecordError(f"{place} no field {field!r}, only {found}{hint}")
    return record[field]


def _string(record: Mapping[str, Any], field: str, where: str = "") -> str:
    value = _field(record, field, where)
    name = f"{where}.{field}" if where else repr(field)
    if not isinstance(value, str):
        raise RecordError(f"{name} is {_kind(value)}; expected a string")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:  # "\ud800" is valid JSON, but no tokenizer takes half a character
        raise RecordError(f"{name} contains half a surrogate pair; expected Unicode text") from None
    return value


def _filled(record: Mapping[str, Any], field: str) -> str:
    value = _string(record, field)
    if not value.strip():
        raise RecordError(f"{field!r} is empty; expected some text")
    return value


def _optional(record: Mapping[str, Any], field: str) -> str:
    """The field's text; "" where it is missing, null or blank."""
    if record.get(field) is None:
        return ""
    value = _string(record, field)
    return value if value.strip() else ""


def _names(names: Mapping[str, Any]) -> str:
    """At most eight names, quoted."""
    shown = [repr(name) for name in list(names)[:8]]
    return ", ".join(shown) + (", ..." if len(names) > 8 else "")


def _kind(value: Any) -> str:
    """What JSON calls the value's type, with its article."""
    if value is None:
        return "null"
    kinds = {bool: "a boolean", str: "a string", list: "a list", dict: "an object"}
    return kinds.get(type(value), "a number")
