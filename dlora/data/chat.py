"""A conversation as the model's own chat template writes it, and where the answers are in it.

template.py   the template: what it reads, what it writes
fitting.py    the messages in a form that it takes
answers.py    the spans of the answers in what it writes
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dlora.data.answers import AddedTokens, Answers, TargetSpan
from dlora.data.fitting import Fitting
from dlora.data.formats import Conversation, RecordError
from dlora.data.formats.messages import THINKING, THINKING_NAMES
from dlora.data.formats.record import Message, kind_of
from dlora.data.formats.tools import LISTS, object_list, parsed
from dlora.data.remarks import ControlTokens, Remarks
from dlora.data.template import Template, reserved_names

_KWARGS = "chat_template_kwargs"  # of a record, as in TRL
_Inputs = tuple[Conversation, Mapping[str, Any]]
_READ_LIMIT = 4096  # kinds of conversations that are remembered
_HANDLED = {"role", "content", "tool_calls", *THINKING_NAMES}


@dataclass(frozen=True, slots=True)
class Rendered:
    """A text to tokenize, and its targets in order; without spans every token is a target."""

    text: str
    spans: tuple[TargetSpan, ...] | None
    append_eos: bool  # the text has no end-of-turn token at its end: the EOS id follows, a target


class ChatRenderer:
    """Renders conversations with a tokenizer's chat template.

    Args:
        tokenizer: a fast tokenizer of transformers.
        key: the configuration's name of the data set, for errors.

    Attributes:
        remarks: of all conversations that were rendered.

    Raises:
        UsageError: the tokenizer has no chat template, or it is not valid.
    """

    def __init__(self, tokenizer: Any, key: str) -> None:
        self.template = Template(tokenizer, key)
        self.remarks = Remarks()
        self._tokens = AddedTokens(tokenizer)
        self._control = ControlTokens(tokenizer)
        self._reserved = reserved_names(tokenizer)
        self._fitting = Fitting(self.template)
        self._read: dict[Any, bool] = {}

    def render(
        self, conversation: Conversation, beside: Mapping[str, Any] | None = None
    ) -> Rendered:
        """The whole conversation, with a span for every answer that is trained on.

        Messages behind the last answer have no loss and are left out.

        Args:
            beside: fields of the record beside the messages; the template gets those that it
                reads, and the others are counted as ignored.

        Raises:
            RecordError: the template refuses the conversation, or changes an answer or leaves out
                a part of it.
        """
        remarks = Remarks()
        variables = self._variables(beside or {}, remarks)
        last = max(i for i, turn in enumerate(conversation) if turn["role"] == "assistant")
        turns = conversation[: last + 1]
        trained = [i for i, t in enumerate(turns) if _is_trained(t)]
        if not trained:
            raise RecordError("the record has nothing to train on up to its last answer")
        turns = [self._for_template(turn) for turn in turns]
        turns = self._fitting.fit(turns, variables)
        self._count_ignored(turns, variables, remarks)

        answers = Answers(self.template, self._tokens, turns, variables)
        text = answers.text
        spans = [answers.span(i) for i in trained]
        answers.check_history(set(range(len(turns))) - set(trained))
        append_eos = trained[-1] == last and not spans[-1].ends_turn
        remarks.thinking = len(answers.no_thinking)
        remarks.control_tokens = self._control.count([*turns, variables])
        self.remarks.add(remarks)
        # If an EOS is appended, the template's text behind the answer must not precede it.
        return Rendered(text[: spans[-1].end] if append_eos else text, tuple(spans), append_eos)

    def _variables(self, beside: Mapping[str, Any], remarks: Remarks) -> dict[str, Any]:
        """Of the fields beside the messages, those that the template reads."""
        found: dict[str, Any] = {}
        for name, value in beside.items():
            if name in LISTS:
                if not (value := object_list(value, repr(name))):
                    continue
            elif name == "functions" and "tools" not in beside:  # OpenAI's earlier name
                tools = object_list(value, repr(name))
                name, value = "tools", [{"type": "function", "function": f} for f in tools]
            elif name == _KWARGS:
                found |= self._kwargs(parsed(value, repr(name)), remarks)
                continue
            if name in self.template.variables:
                found[name] = value
            else:
                remarks.ignored[name] += 1
        return found

    def _kwargs(self, kwargs: Any, remarks: Remarks) -> dict[str, Any]:
        if not isinstance(kwargs, dict):
            raise RecordError(f"{_KWARGS!r} is {kind_of(kwargs)}; expected an object")
        if reserved := self._reserved & kwargs.keys():
            raise RecordError(
                f"{_KWARGS!r} has {min(reserved)!r}, which is not the record's to set"
            )
        ignored = kwargs.keys() - self.template.variables
        remarks.ignored.update(f"{_KWARGS}.{name}" for name in sorted(ignored))
        return {name: value for name, value in kwargs.items() if name not in ignored}

    def _for_template(self, turn: Message) -> Message:
        """The message without its mark, its thinking under the names that the template reads."""
        made = {name: value for name, value in turn.items() if name != "train"}
        if THINKING in made:  # transformers itself adds "thinking"
            made |= {n: made[THINKING] for n in THINKING_NAMES if n in self.template.names}
        return made

    def _count_ignored(
        self, turns: Conversation, variables: Mapping[str, Any], remarks: Remarks
    ) -> None:
        """Count what changes nothing in what the template writes."""
        for name in variables:
            rest = {other: value for other, value in variables.items() if other != name}
            kind = (name, *(turn["role"] for turn in turns))
            if not self._changes(kind, (turns, variables), (turns, rest)):
                remarks.ignored[name] += 1
        for name in sorted({name for turn in turns for name in turn.keys() - _HANDLED}):
            without = [{k: v for k, v in turn.items() if k != name} for turn in turns]
            kind = (name, *((turn["role"], name in turn) for turn in turns))
            read = name in self.template.names
            if not (read and self._changes(kind, (turns, variables), (without, variables))):
                remarks.ignored[f"message.{name}"] += sum(name in turn for turn in turns)

    def _changes(self, kind: Any, whole: _Inputs, less: _Inputs) -> bool:
        """Whether the template writes something else of less, for conversations of a kind."""
        if len(self._read) > _READ_LIMIT:
            self._read.clear()
        if kind not in self._read:
            text = self.template.apply(*whole)
            try:
                self._read[kind] = self.template.apply(*less) != text
            except RecordError:  # it needs what is missing
                self._read[kind] = True
        return self._read[kind]


def _is_trained(turn: Mapping[str, Any]) -> bool:
    return turn["role"] == "assistant" and turn.get("train") is not False
