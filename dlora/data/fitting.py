"""Messages in a form that a chat template takes, so that it leaves nothing out.

Templates differ in what they take: some know no role "developer", print arguments of a call as they
are or as JSON, or loop over the parts of a text. A form counts as taken if other texts in the place
of the record's own turn up in what the template writes.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from itertools import combinations
from typing import Any

from dlora.data.answers import MARKER, with_text
from dlora.data.formats import Conversation, RecordError
from dlora.data.formats.messages import text_of
from dlora.data.formats.record import Message
from dlora.data.template import Template

_ALIASES = {"developer": "system", "function": "tool"}  # of OpenAI's roles, for other templates
_CALL = "\ue0d2"  # as in `MARKER`
Changes = tuple[Callable[[Message], Message], ...]
_FOUND_LIMIT = 4096  # kinds of conversations that are remembered


class Fitting:
    """Finds the form for one template, and remembers it for conversations of the same kind."""

    def __init__(self, template: Template) -> None:
        self._template = template
        self._found: dict[Any, Changes] = {}
        self._takes_parts: bool | None = None

    def fit(self, messages: Conversation, variables: Mapping[str, Any]) -> Conversation:
        """The messages in the first form that the template takes.

        Raises:
            RecordError: it takes none; the message is that of the messages as they are.
        """
        kind = (*map(_kind, messages), *sorted(variables))
        messages = [self._joined(turn) for turn in messages]
        if (known := self._found.get(kind)) is not None:
            return _changed(messages, known)
        failure: RecordError | None = None
        for changes, form in self._forms(messages):
            try:
                if not (left_out := self._left_out(form, variables)):
                    if len(self._found) < _FOUND_LIMIT:
                        self._found[kind] = changes
                    return form
                failure = failure or RecordError(
                    f"the model's chat template leaves out {left_out}; name one that writes it "
                    "with data.chat_template"
                )
            except RecordError as error:
                failure = failure or error
        assert failure is not None
        raise failure

    def _forms(self, messages: Conversation) -> Iterator[tuple[Changes, Conversation]]:
        """The messages as they are, and as they are after any of the changes."""
        seen: list[Conversation] = []
        for size in range(len(_CHANGES) + 1):
            for changes in combinations(_CHANGES, size):
                form = _changed(messages, changes)
                loops = _in_parts not in changes or self._loops_over_parts()
                if loops and form not in seen:
                    seen.append(form)
                    yield changes, form

    def _joined(self, turn: Message) -> Message:
        """Parts as one text, but where the template loops over parts itself."""
        if not isinstance(turn.get("content"), list):
            return turn
        if turn["role"] != "assistant" and self._loops_over_parts():
            return turn
        return {**turn, "content": text_of(turn)}

    def _loops_over_parts(self) -> bool:
        if self._takes_parts is None:
            texts = [f"{MARKER}{i}" for i in range(2)]
            parts = [{"type": "text", "text": text} for text in texts]
            try:
                text = self._template.apply([{"role": "user", "content": parts}], {})
            except RecordError:
                text = ""
            self._takes_parts = all(t in text for t in texts) and "'text'" not in text
        return self._takes_parts

    def _left_out(self, messages: Conversation, variables: Mapping[str, Any]) -> str:
        """Names of what the template does not write, or ""."""
        self._template.apply(messages, variables)  # whether it takes them
        marked, marks = [], {}
        for i, turn in enumerate(messages):
            changed = turn
            if text_of(turn).strip():
                changed = with_text(turn, mark := f"{MARKER}{i}{MARKER}")
                marks[mark] = f"message {i + 1} of role {turn['role']!r}"
            if turn.get("tool_calls"):
                mark = f"{MARKER}{i}{_CALL}{MARKER}"
                changed = {**changed, "tool_calls": [_marked(c, mark) for c in turn["tool_calls"]]}
                marks[mark] = f"the tool calls of message {i + 1}"
            marked.append(changed)
        try:
            text = self._template.apply(marked, variables)
        except RecordError:  # it checks texts; then what it writes of this conversation is all
            return ""
        return " and ".join(what for mark, what in marks.items() if mark not in text)


def _kind(turn: Message) -> tuple[Any, ...]:
    """What decides whether a template takes a message, whatever its text."""
    calls = tuple(type(c["function"]["arguments"]) for c in turn.get("tool_calls", ()))
    content = turn.get("content")
    blank = not content, not text_of(turn).strip()
    return (turn["role"], type(content), *blank, calls, *sorted(turn))


def _changed(messages: Conversation, changes: Changes) -> Conversation:
    for change in changes:
        messages = [change(turn) for turn in messages]
    return messages


def _marked(call: dict[str, Any], mark: str) -> dict[str, Any]:
    """The call with other arguments, of the same type."""
    other: Any = {mark: mark}
    if isinstance(call["function"]["arguments"], str):
        other = json.dumps(other, ensure_ascii=False)
    return {**call, "function": {**call["function"], "arguments": other}}


def _with_alias(turn: Message) -> Message:
    role = turn["role"]
    return {**turn, "role": _ALIASES[role]} if role in _ALIASES else turn


def _in_parts(turn: Message) -> Message:
    if isinstance(turn.get("content"), str):
        return {**turn, "content": [{"type": "text", "text": turn["content"]}]}
    return turn


def _other_blank(turn: Message) -> Message:
    """An answer of calls alone: without a content, or with an empty one."""
    if turn.get("tool_calls") and not turn.get("content"):
        bare = {name: value for name, value in turn.items() if name != "content"}
        return bare if "content" in turn else {**turn, "content": ""}
    return turn


def _arguments_as_text(turn: Message) -> Message:
    if not turn.get("tool_calls"):
        return turn
    calls = []
    for call in turn["tool_calls"]:
        arguments = call["function"]["arguments"]
        if not isinstance(arguments, str):
            arguments = json.dumps(arguments, ensure_ascii=False)
        calls.append({**call, "function": {**call["function"], "arguments": arguments}})
    return {**turn, "tool_calls": calls}


_CHANGES: Changes = (_arguments_as_text, _other_blank, _with_alias, _in_parts)
