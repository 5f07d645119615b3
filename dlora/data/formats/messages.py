"""Messages of a conversation: roles, texts in parts, thinking, calls of tools, and marks."""

from collections.abc import Iterator, Mapping
from typing import Any

from dlora.data.formats.marks import mark, take_mark, trained
from dlora.data.formats.record import (
    Conversation,
    Message,
    RecordError,
    as_text,
    kind_of,
    names,
    optional,
    string,
)
from dlora.data.formats.tools import calls_of, take_calls

ROLES = {role: role for role in ("system", "developer", "user", "assistant", "tool", "function")}
SHAREGPT_ROLES = {
    **ROLES,
    "function": "tool",
    **dict.fromkeys(("human", "prompter"), "user"),
    **dict.fromkeys(("gpt", "model", "bot", "chatgpt", "bard", "bing"), "assistant"),
    **dict.fromkeys(("observation", "function_response", "tool_response", "ipython"), "tool"),
    **dict.fromkeys(("function_call", "tool_call"), "assistant"),
}
_CALLS = ("function_call", "tool_call")  # roles whose text is a call of a tool
_PART = ("type", "text", "thinking")  # what is read of a part of a content
THINKING = "reasoning_content"  # the name that transformers hands to templates under all of them
THINKING_NAMES = (THINKING, "thinking", "reasoning")


def conversation(
    record: Mapping[str, Any], field: str, role_field: str, text_field: str, answer: str
) -> Conversation:
    """The messages that the list at `field` has.

    Args:
        role_field, text_field: of each of its objects.
        answer: what a message to train on has, for the error where there is none.
    """
    read = [message(t, f"{field}[{i}]", role_field, text_field) for i, t in turns(record, field)]
    return checked(read, field, answer)


def turns(record: Mapping[str, Any], field: str) -> Iterator[tuple[int, Any]]:
    """The objects in the list at `field`, counted."""
    if field not in record:
        string(record, field)  # raises
    value = record[field]
    if not isinstance(value, list):
        raise RecordError(f"{field!r} is {kind_of(value)}; expected a list of objects")
    if not value:
        raise RecordError(f"{field!r} is empty; expected at least a question and an answer")
    return enumerate(value)


def message(
    turn: Any, where: str, role_field: str = "role", text_field: str = "content"
) -> Message:
    """One message of a conversation; `where` names it in errors, such as "messages[2]"."""
    if not isinstance(turn, dict):
        raise RecordError(
            f"{where} is {kind_of(turn)}; expected an object with {role_field!r} and {text_field!r}"
        )
    roles = SHAREGPT_ROLES if role_field == "from" else ROLES
    name = string(turn, role_field, where)
    if name not in roles:
        raise RecordError(f"{where} has {role_field} {name!r}; expected one of {_all(roles)}")
    rest = {k: v for k, v in turn.items() if k not in (role_field, text_field) and v is not None}
    role = roles[name]
    mark_of_turn = take_mark(rest, where)
    if name in _CALLS:
        text = string(turn, text_field, where)
        made: Message = {
            "role": role,
            "content": "",
            "tool_calls": calls_of(text, f"{where}.{text_field}"),
        }
    else:
        made = {"role": role} | _content(turn, where, text_field, rest)
    _take_thinking(made, rest, where)
    if calls := take_calls(rest, where):
        if role != "assistant":
            raise RecordError(f"{where} of role {role!r} has 'tool_calls'; expected no calls")
        made["tool_calls"] = calls
    for field in ("role", "content"):  # a field of that name would replace what was read
        if field in rest:
            raise RecordError(f"{where} has {role_field!r} and {field!r}; expected one of the two")
    made |= rest
    mark(made, mark_of_turn, where)
    return made


def _content(turn: dict[str, Any], where: str, field: str, rest: Message) -> Message:
    """The text, or a list of texts, of a message; {} if it has none and calls tools instead."""
    value, name = turn.get(field), f"{where}.{field}"
    if value is None and any(rest.get(call) for call in ("tool_calls", "function_call")):
        return {}
    if not isinstance(value, list):
        return {"content": string(turn, field, where)}
    texts: list[str] = []
    thoughts: list[str] = []
    for i, part in enumerate(value):
        kind, text = _part(part, f"{name}[{i}]")
        (thoughts if kind == "thinking" else texts).append(text)
        others = part.items() if isinstance(part, dict) else ()
        rest |= {f"content.{k}": v for k, v in others if k not in _PART and v is not None}
    thought = "".join(thoughts)
    if thought and rest.setdefault(THINKING, thought) != thought:
        raise RecordError(f"{name} and {THINKING!r} say different things; expected one of them")
    if len(texts) == 1:
        return {"content": texts[0]}
    return {"content": [{"type": "text", "text": text} for text in texts]}


def _part(part: Any, where: str) -> tuple[str, str]:
    """(kind, text) of a part of a message."""
    if isinstance(part, str):
        return "text", as_text(part, where)
    if not isinstance(part, dict):
        raise RecordError(f"{where} is {kind_of(part)}; expected an object with 'type' and 'text'")
    kind = part.get("type", "text" if "text" in part else None)
    if kind == "thinking":
        inner = part.get("thinking")
        if isinstance(inner, list):
            inner = "".join(_part(p, f"{where}.thinking")[1] for p in inner)
        return "thinking", as_text(inner, f"{where}.thinking")
    if kind not in ("text", "input_text", "output_text"):
        what = kind if isinstance(kind, str) else names(part) or "nothing"
        raise RecordError(f"{where} is a part of type {what!r}; only text parts are supported")
    return "text", string(part, "text", where)


def _take_thinking(made: Message, rest: Message, where: str) -> None:
    """Move what the message thought under the one name; spellings that differ are refused."""
    found = {name: rest.pop(name) for name in THINKING_NAMES if name in rest}
    texts = {as_text(value, f"{where}.{name}") for name, value in found.items()}
    texts = {text for text in texts if text.strip()}
    if len(texts) > 1:
        raise RecordError(f"{where} has different texts in {names(found)}; expected one of them")
    if texts:
        if made["role"] != "assistant":
            raise RecordError(f"{where} of role {made['role']!r} has {names(found)}; expected none")
        made[THINKING] = texts.pop()


def checked(read: Conversation, field: str, wanted: str) -> Conversation:
    """The conversation, once it is known to have an answer and no empty one."""
    if not any(turn["role"] == "assistant" for turn in read):
        raise RecordError(f"{field!r} has nothing to train on; expected a message with {wanted}")
    for i, turn in enumerate(read):
        if turn["role"] == "assistant" and turn.get("train") is not False and not _says(turn):
            raise RecordError(f"{field}[{i}] is an empty answer; expected some text")
    return read


def check_trained(read: Conversation) -> None:
    """Raise a `RecordError` if all answers are marked as not to be trained on."""
    if not trained(read):
        raise RecordError(
            "the record has nothing to train on: all of its answers are marked as not trained on"
        )


def _says(turn: Message) -> bool:
    return bool(text_of(turn).strip() or turn.get("tool_calls"))


def text_of(turn: Message) -> str:
    """The text of a message, its parts joined."""
    content = turn.get("content")
    if isinstance(content, list):
        return "".join(part["text"] for part in content)
    return content or ""


def with_system(record: Mapping[str, Any], read: Conversation) -> Conversation:
    """The conversation behind a system text of the record, where there is one.

    Raises:
        RecordError: it begins with another system text already.
    """
    field = "system" if record.get("system") is not None else "system_prompt"
    prompt = optional(record, field)
    own = [turn for turn in read if turn["role"] in ("system", "developer")]
    if not prompt or any(text_of(turn).strip() == prompt.strip() for turn in own):
        return read
    if own:
        raise RecordError(
            f"{field!r} and a message of role {own[0]['role']!r} say different things; expected "
            "one system text"
        )
    return [{"role": "system", "content": prompt}, *read]


def _all(roles: Mapping[str, str]) -> str:
    return ", ".join(map(repr, roles))
