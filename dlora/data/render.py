"""Whatever a format makes of a record, as a text to tokenize with its targets."""

from collections.abc import Mapping
from typing import Any

from dlora.data.answers import TargetSpan
from dlora.data.chat import ChatRenderer, Rendered
from dlora.data.formats import Continuation, Conversation
from dlora.data.remarks import ControlTokens, Remarks


class Renderer:
    """Renders records for one tokenizer.

    Args:
        tokenizer: a fast tokenizer of transformers; it needs a chat template for conversations.
        key: the configuration's name of the data set, for errors.

    Attributes:
        remarks: of all records that were rendered.
    """

    def __init__(self, tokenizer: Any, key: str) -> None:
        self._tokenizer, self._key = tokenizer, key
        self._chats: ChatRenderer | None = None
        self._control: ControlTokens | None = None
        self.remarks = Remarks()

    def chats(self) -> ChatRenderer:
        """The renderer of conversations.

        Raises:
            UsageError: the tokenizer has no chat template, or it is not valid.
        """
        if self._chats is None:
            self._chats = ChatRenderer(self._tokenizer, self._key)
            self._chats.remarks = self.remarks
        return self._chats

    def render(
        self, content: Conversation | Continuation | str, beside: Mapping[str, Any]
    ) -> Rendered:
        """What a format made of a record, as a text.

        Args:
            beside: the fields of the record that the format did not read.

        Raises:
            RecordError: the chat template refuses the conversation, or changes or leaves out a
                part of it.
        """
        if isinstance(content, list):
            return self.chats().render(content, beside)
        self.remarks.ignored.update(beside.keys())
        if isinstance(content, str):
            self._count_control_tokens(content)
            return Rendered(content, spans=None, append_eos=True)
        self._count_control_tokens(content.prompt + content.completion)
        text = content.prompt + content.completion
        span = TargetSpan(len(content.prompt), len(text), ends_turn=False)
        return Rendered(text, (span,), append_eos=True)

    def _count_control_tokens(self, text: str) -> None:
        """Count those within a text; at its ends they are what the tokenizer would add."""
        if self._control is None:
            self._control = ControlTokens(self._tokenizer)
        bos, eos = self._tokenizer.bos_token, self._tokenizer.eos_token
        text = text.removeprefix(bos or "").removesuffix(eos or "")
        self.remarks.control_tokens += self._control.count(text)
