"""Where the answers of a conversation are in the text that a chat template writes.

What is trained on, between [ and ], for ChatML:

    <|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\n[Hello!<|im_end|>]\\n

A span runs from what the model itself has to write first (behind the generation prompt) to the end
of the end-of-turn token. It is found in characters by rendering the conversation once more with a
marker in place of the answer: the text around the marker is the text around the answer. Whatever a
template does to an answer beyond trimming it is refused, so no wrong token is ever a target. Where
an answer is more than a text, as with thinking or calls of tools, the marker replaces all of it.
"""

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dlora.data.formats import Conversation, RecordError
from dlora.data.formats.messages import THINKING, THINKING_NAMES, text_of
from dlora.data.formats.record import Message
from dlora.data.remarks import any_of
from dlora.data.template import Template

# Private-use characters, so that no text contains it; no white space, so that no template trims it.
_NAMES = frozenset(THINKING_NAMES)
MARKER = "\ue0d1\ue0ca\ue0d1"


@dataclass(frozen=True, slots=True)
class TargetSpan:
    """Characters [start, end) of a text that are targets."""

    start: int
    end: int
    ends_turn: bool  # whether its last token is an end-of-turn token


class AddedTokens:
    """Patterns of a tokenizer's added tokens. Gemma adds runs of white space; they end no turn."""

    def __init__(self, tokenizer: Any) -> None:
        tokens = {str(token) for token in tokenizer.added_tokens_decoder.values()}
        tokens.update(str(token) for token in tokenizer.all_special_tokens)
        self.one = any_of(tokens)
        self.some = re.compile(f"(?:{self.one.pattern})+")
        self.last = re.compile(rf"(?:{self.one.pattern})+(?=\s*\Z)")
        self.eos: str | None = tokenizer.eos_token


class Answers:
    """The answers of one conversation.

    Attributes:
        text: the conversation as the template writes it.
        no_thinking: the messages whose thinking is not in it.

    Raises:
        RecordError: the template refuses the conversation.
    """

    def __init__(
        self,
        template: Template,
        tokens: AddedTokens,
        messages: Conversation,
        variables: Mapping[str, Any],
    ) -> None:
        self._template, self._tokens = template, tokens
        self._messages, self._variables = messages, variables
        texts = [turn["content"] for turn in messages if "content" in turn]
        self._in_parts = all(isinstance(text, list) for text in texts)
        self.text = self._apply(messages)
        self.no_thinking: list[int] = []

    def span(self, i: int) -> TargetSpan:
        """The targets of message i.

        Raises:
            RecordError: the template changes the answer, or leaves out its thinking although it
                is the last one.
        """
        turn = self._messages[i]
        if THINKING not in turn and not turn.get("tool_calls"):
            return self._text_span(i)
        span = self._whole_span(i)
        written = _squeezed(self.text[span.start : span.end])
        if _squeezed(text_of(turn)) not in written:
            raise self._changed(i)
        if self._lacks_thinking(i):
            if i == len(self._messages) - 1 or not _NAMES & self._template.names:
                raise RecordError(
                    f"the model's chat template leaves out the thinking of message {i + 1}; name "
                    "one that writes it with data.chat_template"
                )
            self.no_thinking.append(i)
        elif _squeezed(turn.get(THINKING, "")) not in written:
            raise self._changed(i)
        return span

    def check_history(self, untrained: Iterable[int]) -> None:
        """Note the thinking that the text lacks of answers that are not trained on."""
        self.no_thinking += [i for i in untrained if self._lacks_thinking(i)]

    def _lacks_thinking(self, i: int) -> bool:
        """Whether message i has thinking, without which the text would be the same."""
        messages = self._messages
        if THINKING not in messages[i]:
            return False
        return self._try([*messages[:i], _without_thinking(messages[i]), *messages[i + 1 :]]) == (
            self.text
        )

    def _text_span(self, i: int) -> TargetSpan:
        messages, text = self._messages, self.text
        marked = [*messages[:i], with_text(messages[i], MARKER), *messages[i + 1 :]]
        before, found, after = self._apply(marked).partition(MARKER)
        prompt = self._prompt(i)
        # What the template prints behind message i itself, before the next message begins.
        tail = after
        if i + 1 < len(messages):
            tail = self._apply(marked[: i + 1]).partition(MARKER)[2]

        content = text_of(messages[i])
        start, end = len(before), len(text) - len(after)
        around = found and start < end and text.startswith(before) and text.endswith(after)
        if around and text[start:end].strip() == content.strip():
            # White space between generation prompt and answer is the model's to write (Llama 2).
            if (
                prompt is not None
                and len(prompt) <= start
                and not text[len(prompt) : start].strip()
            ):
                start = len(prompt)
        else:
            start, end = self._reasoning(i, prompt, tail)
        stop, ends_turn = self._turn_end(end, tail)
        return TargetSpan(start, stop, ends_turn)

    def _prompt(self, i: int) -> str | None:
        """What the model is given to write message i, if the text begins with it."""
        if i == 0:
            return None
        try:
            prompt = self._apply(self._messages[:i], prompt=True)
        except RecordError:  # two answers in a row: some templates only prompt behind a user
            return None
        return prompt if self.text.startswith(prompt) else None

    def _reasoning(self, i: int, prompt: str | None, tail: str) -> tuple[int, int]:
        """Start and end of an answer whose parts the template takes apart, as for <think>.

        Accepted if the text behind the generation prompt is the same answer, but for white space.
        A prompt may write the answer's first part itself, such as "<think>".
        """
        text, whole = self.text, self._apply(self._messages[: i + 1])
        content = _squeezed(text_of(self._messages[i]))
        if prompt is not None and text.startswith(whole) and whole.endswith(tail):
            start, end = len(prompt), len(whole) - len(tail)
            answer = _squeezed(text[start:end])
            if answer and content.endswith(answer) and _squeezed(text[:end]).endswith(content):
                return start, end
        raise self._changed(i)

    def _whole_span(self, i: int) -> TargetSpan:
        """The span of an answer that is more than a text, by the text that stands in its place."""
        text, messages = self.text, self._messages
        other_turn = {"role": "assistant", "content": [] if self._in_parts else ""}
        marked: Conversation = [*messages[:i], with_text(other_turn, MARKER)]
        tail = self._try(marked).partition(MARKER)[2]
        before, found, after = self._try([*marked, *messages[i + 1 :]]).partition(MARKER)
        if found and text.endswith(after) and len(after) < len(text):
            end = len(text) - len(after)
            common = len(os.path.commonprefix([before, text[:end]]))
            stop, ends_turn = self._turn_end(end, tail)
            return TargetSpan(self._start(i, before, common), stop, ends_turn)
        # The template needs the calls behind which results of tools come, or ends them otherwise.
        bare = [_without_thinking(turn) for turn in messages[: i + 1]]
        for upto in (messages[: i + 1], bare):
            whole = self._try(upto)
            last = self._tokens.last.search(whole)
            end = last.end() if last else len(whole.rstrip())
            if end and text.startswith(whole[:end]):
                before = self._try(marked).partition(MARKER)[0]
                common = len(os.path.commonprefix([before, whole[:end]]))
                return TargetSpan(self._start(i, before, common), end, last is not None)
        raise self._changed(i)

    def _start(self, i: int, before: str, common: int) -> int:
        """Where the model begins to write message i.

        Args:
            before: what the template writes before another answer in its place.
            common: characters of it that are before this one as well.
        """
        if (prompt := self._prompt(i)) is not None:
            return len(prompt)
        # Answers before it may look otherwise in the prompt; what opens an answer is its end.
        history = self._messages[:i]
        whole = self._try(history)
        opened = self._try(history, prompt=True).removeprefix(whole) if whole else ""
        at = before.rfind(opened) if opened.strip() else -1
        start = len(before) if at < 0 else at + len(opened)
        if start > common:
            raise self._changed(i)
        return start

    def _turn_end(self, end: int, tail: str) -> tuple[int, bool]:
        """Where the turn of the answer that ends at `end` is over, and whether by a token.

        Without an end-of-turn token, a marker in plain text counts as part of the answer.
        """
        text, tokens = self.text, self._tokens
        if text.startswith(tail, end):
            # Several in a row belong together: <|END_RESPONSE|><|END_OF_TURN_TOKEN|> (Cohere).
            found = tokens.some.search(text, end, end + len(tail))
            if found:
                return found.end(), True
            end += len(tail.rstrip())
            # The next message may begin with the EOS, closing this one.
            if tokens.eos and text.startswith(tokens.eos, end):
                return end + len(tokens.eos), True
        elif token := tokens.one.match(text, end):  # another token ends turns that are not last
            return token.end(), True
        return end, False

    def _changed(self, i: int) -> RecordError:
        return RecordError(
            f"the model's chat template changes the answer in message {i + 1} of this "
            "conversation (templates drop reasoning from all answers but the last); expected an "
            "answer that it prints as it is"
        )

    def _apply(self, messages: Sequence[Message], prompt: bool = False) -> str:
        return self._template.apply(messages, self._variables, prompt)

    def _try(self, messages: Sequence[Message], prompt: bool = False) -> str:
        try:
            return self._apply(messages, prompt)
        except RecordError:
            return ""


def with_text(turn: Message, text: str) -> Message:
    """The message with another text, in parts if it has parts."""
    in_parts = isinstance(turn.get("content"), list)
    return {**turn, "content": [{"type": "text", "text": text}] if in_parts else text}


def _without_thinking(turn: Message) -> Message:
    return {name: value for name, value in turn.items() if name not in _NAMES}


def _squeezed(text: str) -> str:
    return "".join(text.split())
