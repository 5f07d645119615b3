"""What a data format is, and what all of them read records with.

A new one is one file of this folder with a class like those beside it. Its `read` raises
`RecordError` for whatever it cannot take; the reader puts the file and the line in front.
"""

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Protocol

Conversation = list[dict[str, str]]  # [{"role": "user", "content": "..."}, ...], as in transformers

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


class RecordError(ValueError):
    """A record does not fit its format; the message says what was found and what was expected."""


class RecordFormat(Protocol):
    """A layout of records.

    Attributes:
        name: the value of `data.format`.
        fields: of a record that it reads; `data.columns` names where they are.
    """

    name: ClassVar[str]
    fields: ClassVar[tuple[str, ...]]

    @staticmethod
    def read(record: dict[str, Any]) -> Conversation | str:
        """The record as a conversation, or as a plain text of which every token is trained on.

        Raises:
            RecordError: the record does not fit.
        """


def conversation(
    record: dict[str, Any], field: str, role_field: str, text_field: str, answer: str
) -> Conversation:
    """The messages that the list at `field` has.

    Args:
        role_field, text_field: of each of its objects.
        answer: what a message to train on has, for the error where there is none.
    """
    read = [_turn(t, f"{field}[{i}]", role_field, text_field) for i, t in _turns(record, field)]
    return _checked(read, field, answer)


def _turns(record: dict[str, Any], field: str) -> Iterator[tuple[int, Any]]:
    value = _field(record, field)
    if not isinstance(value, list):
        raise RecordError(f"{field!r} is {_kind(value)}; expected a list of objects")
    if not value:
        raise RecordError(f"{field!r} is empty; expected at least a question and an answer")
    return enumerate(value)


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


def system(record: dict[str, Any]) -> Conversation:
    prompt = optional(record, "system")
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


def filled(record: Mapping[str, Any], field: str) -> str:
    value = _string(record, field)
    if not value.strip():
        raise RecordError(f"{field!r} is empty; expected some text")
    return value


def optional(record: Mapping[str, Any], field: str) -> str:
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
