"""From texts with spans to token ids and labels.

    ids     t0   t1   t2   t3   t4        labels are not shifted: labels[i] is ids[i] where token i
    labels  -100 -100 t2   t3   -100      is a target and -100 elsewhere; `collate` shifts them

Token 0 has no predecessor that could predict it, so labels[0] is always -100 and the number of
targets is the number of positions whose label is not -100.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dlora.data.answers import TargetSpan
from dlora.data.chat import Rendered
from dlora.errors import UsageError

NO_TARGET = -100
SECOND = -101  # no target either: the first token of the second of two sequences in one example
Int32Array = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True, eq=False)
class Example:
    """One sequence of the data set.

    Attributes:
        id: its position in the data set, whatever the world size; `dataset[id]` is this example.
        input_ids: int32 [S], read-only.
        labels: int32 [S], read-only, not shifted, -100 where there is no loss.
    """

    id: int
    input_ids: Int32Array
    labels: Int32Array

    @property
    def num_targets(self) -> int:
        """Number of labels that are targets."""
        return count_targets(self.labels)

    def __len__(self) -> int:
        return len(self.input_ids)


def count_targets(labels: Int32Array) -> int:
    """Number of positions whose label is a token, or a class."""
    return int(np.count_nonzero(labels >= 0))


def longest_row(labels: Int32Array) -> int:
    """Tokens that a model sees in one row: of an example of two sequences, those of the longer."""
    [*second] = np.flatnonzero(labels == SECOND)
    first = int(second[0]) if second else len(labels)
    return max(first, len(labels) - first)


def added_around(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Ids that the tokenizer adds before and behind a text, such as a BOS."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    for start in range(len(whole) - len(bare) + 1):
        if whole[start : start + len(bare)] == bare:
            return whole[:start], whole[start + len(bare) :]
    return [], []


def once(ids: list[int], around: tuple[list[int], list[int]]) -> slice:
    """The tokens of a text without those of the tokenizer's own that the text writes as well."""
    before, after = around
    first, stop = 0, len(ids)
    if before and ids[len(before) : 2 * len(before)] == before:
        first = len(before)
    if after and ids[-2 * len(after) : -len(after)] == after:
        stop -= len(after)
    return slice(first, stop)


def text_prompt(tokenizer: Any, text: str) -> list[int]:
    """Ids of a plain text that is to be continued: as in training, but without an end."""
    before, after = added_around(tokenizer)
    ids = tokenizer(text)["input_ids"]
    ids = ids[: len(ids) - len(after)]
    return ids[once(ids, (before, []))]


class Encoder:
    """Tokenizes rendered texts.

    Args:
        tokenizer: a fast tokenizer of transformers.
        special_tokens: let the tokenizer add its own around each text, such as a BOS. Plain texts
            want them; a chat template writes them itself.
        key: the configuration's name of the data set, for errors.

    Attributes:
        ends: token ids that ended what was trained on so far; see `stop_tokens`.

    Raises:
        UsageError: the tokenizer is a slow one, which has no character offsets.
    """

    def __init__(self, tokenizer: Any, *, special_tokens: bool, key: str):
        if not getattr(tokenizer, "is_fast", False):
            raise UsageError(
                f"{key}: the model's tokenizer ({type(tokenizer).__name__}) does not report the "
                "positions of tokens in the text; a fast tokenizer (tokenizer.json) is needed"
            )
        self.tokenizer = tokenizer
        self.special_tokens = special_tokens
        self.key = key
        self.added = {*tokenizer.added_tokens_decoder, *tokenizer.all_special_ids}
        self._around = added_around(tokenizer) if special_tokens else ([], [])
        self._last_ends: set[int] = set()  # of the last answers of conversations
        self._other_ends: set[int] = set()
        self._inside: set[int] = set()  # added tokens in answers, before their ends

    shortened = 0  # by the encoder itself

    def limit(self, max_length: int) -> int:
        """Tokens of a sequence, beyond which it is cut."""
        return max_length

    @property
    def ends(self) -> list[int]:
        """Ids that ended what was trained on so far, and so end what is generated.

        One that only ends earlier turns and also stands inside of answers, as between the channels
        of gpt-oss, ends no answer.
        """
        return sorted(self._last_ends | (self._other_ends - self._inside))

    def encode(self, texts: Sequence[Rendered]) -> list[tuple[Int32Array, Int32Array]]:
        """Ids and labels of each text, both int32 [S], in one call of the tokenizer."""
        batch = self.tokenizer(
            [text.text for text in texts],
            add_special_tokens=self.special_tokens,
            return_offsets_mapping=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,  # it would warn of texts above its own maximum; max_length cuts them
        )
        return [
            self._labelled(np.asarray(ids, np.int32), offsets, text)
            for ids, offsets, text in zip(
                batch["input_ids"], batch["offset_mapping"], texts, strict=True
            )
        ]

    def _labelled(
        self, ids: Int32Array, offsets: list[tuple[int, int]], text: Rendered
    ) -> tuple[Int32Array, Int32Array]:
        kept = once(ids.tolist(), self._around)
        ids = ids[kept]
        labels = ids.copy() if text.spans is None else np.full_like(ids, NO_TARGET)
        starts, ends = np.asarray(offsets, np.int64).reshape(-1, 2)[kept].T
        if behind := len(self._around[1]):  # their offsets are 0, but they come last
            starts[-behind:] = ends[-behind:] = len(text.text)
        for number, span in enumerate(text.spans or (), start=1):
            first, stop = self._tokens(span, starts, ends)
            if first < stop and text.text[starts[first] : span.start].strip():
                first += 1  # a token that joins header and answer; never met when generating
            if span.ends_turn and (stop <= first or int(ids[stop - 1]) not in self.added):
                raise UsageError(
                    f"{self.key}: the tokenizer's offsets do not cover the end-of-turn token of "
                    f"{text.text[-60:]!r}; this tokenizer cannot be used for chats"
                )
            labels[first:stop] = ids[first:stop]
            self._note(ids[first:stop], span, number == len(text.spans or ()))
        if text.append_eos:
            eos = self._eos()
            if not len(ids) or ids[-1] != eos:
                ids = np.append(ids, np.int32(eos))
                labels = np.append(labels, np.int32(eos))
            labels[-1] = eos
            self._last_ends.add(eos)
        labels[:1] = NO_TARGET
        return ids, labels

    def _note(self, answer: Int32Array, span: TargetSpan, is_last: bool) -> None:
        """Note what ends an answer, and what is in it."""
        if not len(answer):
            return
        row = answer.tolist()
        if span.ends_turn:
            (self._last_ends if is_last else self._other_ends).add(row.pop())
        self._inside |= self.added.intersection(row)

    @staticmethod
    def _tokens(
        span: TargetSpan, starts: npt.NDArray[np.int64], ends: npt.NDArray[np.int64]
    ) -> tuple[int, int]:
        """The token range [first, stop) that touches the span's characters.

        A token counts from its own start to the next one's: byte-level tokenizers cut white space
        off the offsets, and leave none at all for a token that is a blank.
        """
        inside = (starts >= span.start) | (ends > span.start)
        first = int(inside.argmax()) if inside.any() else len(starts)
        stop = int(np.searchsorted(starts, span.end, side="left"))
        return first, max(first, stop)

    def _eos(self) -> int:
        eos = self.tokenizer.eos_token_id
        if eos is None:
            raise UsageError(
                f"{self.key}: the model's tokenizer has no end-of-sequence token to end an answer "
                "with; set eos_token in its tokenizer_config.json"
            )
        return int(eos)
