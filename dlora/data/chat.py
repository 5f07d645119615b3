"""A conversation as the model's own chat template writes it, and where the answers are in it.

What is trained on, between [ and ], for ChatML:

    <|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\n[Hello!<|im_end|>]\\n

A span runs from what the model itself has to write first (behind the generation prompt) to the end
of the end-of-turn token. It is found in characters by rendering the conversation once more with a
marker in place of the answer: the text around the marker is the text around the answer. Whatever a
template does to an answer beyond trimming it is refused, so no wrong token is ever a target.
"""

import re
from dataclasses import dataclass
from typing import Any

from dlora.data.formats import Conversation, RecordError
from dlora.errors import UsageError

# Some templates print today's date. A fixed one (Llama 3's own default) keeps the tokens equal on
# all ranks at midnight and in a run that is resumed tomorrow. A macro put before the template hides
# transformers' function; "+%}" keeps the template's first line break.
_FIXED_DATE = (
    "{% macro strftime_now(form) %}{{ form | replace('%Y', '2024') | replace('%m', '07')"
    " | replace('%d', '26') | replace('%B', 'July') | replace('%b', 'Jul')"
    " | replace('%A', 'Friday') | replace('%H', '12') | replace('%M', '00') | replace('%S', '00')"
    " }}{% endmacro +%}"
)
# Private-use characters, so that no text contains it; no white space, so that no template trims it.
_MARKER = "\ue0d1\ue0ca\ue0d1"


@dataclass(frozen=True, slots=True)
class TargetSpan:
    """Characters [start, end) of a text that are targets."""

    start: int
    end: int
    ends_turn: bool  # whether its last token is an end-of-turn token


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

    Raises:
        UsageError: the tokenizer has no chat template.
    """

    def __init__(self, tokenizer: Any, key: str):
        if not getattr(tokenizer, "chat_template", None):
            raise UsageError(
                f"{key}: chats need a chat template, but the model's tokenizer has none; take an "
                "instruct model, put a chat_template.jinja beside the tokenizer, or use "
                "data.format: text"
            )
        self.tokenizer = tokenizer
        template: str = tokenizer.get_chat_template()
        self.template = _FIXED_DATE * ("strftime_now" in template) + template
        self.eos: str | None = tokenizer.eos_token
        # Longest first, so that a token is not taken for another that it begins with. Gemma adds
        # runs of white space as tokens; they end no turn.
        tokens = {str(token) for token in tokenizer.added_tokens_decoder.values()}
        tokens.update(str(token) for token in tokenizer.all_special_tokens)
        names = sorted((token for token in tokens if token.strip()), key=len, reverse=True)
        any_token = "|".join(map(re.escape, names)) or "(?!)"
        self.one_added = re.compile(any_token)
        self.some_added = re.compile(f"(?:{any_token})+")

    def render(self, conversation: Conversation) -> Rendered:
        """The whole conversation, with a span for every answer.

        Messages behind the last answer have no loss and are left out.

        Raises:
            RecordError: the template refuses the conversation or changes an answer.
        """
        last = max(i for i, turn in enumerate(conversation) if turn["role"] == "assistant")
        conversation = conversation[: last + 1]
        text = self._apply(conversation)
        spans = []
        for i, turn in enumerate(conversation):
            if turn["role"] == "assistant":
                spans.append(self._span(text, conversation, i))
        append_eos = not spans[-1].ends_turn
        # If an EOS is appended, the template's text behind the answer must not precede it.
        return Rendered(text[: spans[-1].end] if append_eos else text, tuple(spans), append_eos)

    def _span(self, text: str, conversation: Conversation, i: int) -> TargetSpan:
        marked = conversation.copy()
        marked[i] = {**marked[i], "content": _MARKER}
        before, found, after = self._apply(marked).partition(_MARKER)
        prompt = self._prompt(text, conversation[:i])
        # What the template prints behind message i itself, before the next message begins.
        tail = after
        if i + 1 < len(conversation):
            tail = self._apply(marked[: i + 1]).partition(_MARKER)[2]

        content = conversation[i]["content"]
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
            start, end = self._reasoning(text, conversation[: i + 1], prompt, tail)
        stop, ends_turn = self._turn_end(text, end, tail)
        return TargetSpan(start, stop, ends_turn)

    def _prompt(self, text: str, history: Conversation) -> str | None:
        """What the model is given to write the next answer, if `text` begins with it."""
        if not history:
            return None
        try:
            prompt = self._apply(history, add_generation_prompt=True)
        except RecordError:  # two answers in a row: some templates only prompt behind a user
            return None
        return prompt if text.startswith(prompt) else None

    def _reasoning(
        self, text: str, upto: Conversation, prompt: str | None, tail: str
    ) -> tuple[int, int]:
        """Start and end of an answer whose parts the template takes apart, as for <think>.

        Accepted if the text behind the generation prompt is the same answer, but for white space.
        A prompt may write the answer's first part itself, such as "<think>".
        """
        whole = self._apply(upto)
        content = "".join(upto[-1]["content"].split())
        if prompt is not None and text.startswith(whole) and whole.endswith(tail):
            start, end = len(prompt), len(whole) - len(tail)
            answer = "".join(text[start:end].split())
            if (
                answer
                and content.endswith(answer)
                and "".join(text[:end].split()).endswith(content)
            ):
                return start, end
        raise RecordError(
            f"the model's chat template changes the answer in message {len(upto)} of this "
            "conversation (templates drop reasoning from all answers but the last); expected an "
            "answer that it prints as it is"
        )

    def _turn_end(self, text: str, end: int, tail: str) -> tuple[int, bool]:
        """Where the turn of the answer that ends at `end` is over, and whether by a token.

        Without an end-of-turn token, a marker in plain text counts as part of the answer.
        """
        if text.startswith(tail, end):
            # Several in a row belong together: <|END_RESPONSE|><|END_OF_TURN_TOKEN|> (Cohere).
            tokens = self.some_added.search(text, end, end + len(tail))
            if tokens:
                return tokens.end(), True
            end += len(tail.rstrip())
            # The next message may begin with the EOS, closing this one.
            if self.eos and text.startswith(self.eos, end):
                return end + len(self.eos), True
        elif token := self.one_added.match(text, end):  # another token ends turns that are not last
            return token.end(), True
        return end, False

    def _apply(self, conversation: Conversation, add_generation_prompt: bool = False) -> str:
        try:
            text: str = self.tokenizer.apply_chat_template(
                conversation,
                chat_template=self.template,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
            )
        except Exception as error:  # noqa: BLE001 - a template may raise anything
            raise RecordError(
                f"the model's chat template refuses this conversation: {error}"
            ) from None
        return text
