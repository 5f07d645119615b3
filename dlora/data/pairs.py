"""Pairs of answers as sequences: one example has both, and a micro-batch a row for each.

ids       p0 p1 c0 c1 </s>   p0 p1 r0 </s>          at most max_length tokens each
labels    -100 -100 c0 c1 </s>   -101 -100 r0 </s>      -101: here the second one begins
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dlora.data.chat import Rendered
from dlora.data.collate import Batch, collate
from dlora.data.encode import NO_TARGET, SECOND, Encoder, Example, Int32Array, count_targets
from dlora.data.formats import AnswerPair, RecordError
from dlora.data.remarks import Remarks
from dlora.data.render import Renderer

_Ids = tuple[Int32Array, Int32Array]


@dataclass(frozen=True)
class _Pair:
    """Both answers as texts; those of plain texts get the tokenizer's own tokens around them."""

    chosen: Rendered
    rejected: Rendered
    plain: bool


class AnswerPairs:
    """Renders and tokenizes pairs of answers.

    Args:
        tokenizer: a fast tokenizer of transformers; it needs a chat template for messages.
        key: the configuration's name of the data set, for errors.
        max_length: of a prompt with an answer; longer ones are cut on the right.

    Attributes:
        remarks: of all records that were read.
        shortened: how many pairs lost a part of an answer.
    """

    def __init__(self, tokenizer: Any, key: str, max_length: int) -> None:
        self._max_length = max_length
        self._chosen, self._rejected = (Renderer(tokenizer, key) for _ in range(2))
        self._encoders = {
            plain: Encoder(tokenizer, special_tokens=plain, key=key) for plain in (False, True)
        }
        self.shortened = 0

    def limit(self, max_length: int) -> int:
        """Tokens of an example, whose sequences are cut already."""
        return 2 * max_length

    @property
    def remarks(self) -> Remarks:
        one, other = self._chosen.remarks, self._rejected.remarks
        typed = one.control_tokens + other.control_tokens
        # What stands beside both answers is the record's, and counts once.
        return Remarks(one.ignored | other.ignored, typed, one.thinking + other.thinking)

    @property
    def ends(self) -> list[int]:
        """Ids that ended answers so far."""
        return sorted({end for encoder in self._encoders.values() for end in encoder.ends})

    def render(self, content: AnswerPair, beside: Mapping[str, Any]) -> _Pair:
        """Both answers behind their prompt, as texts.

        Raises:
            RecordError: the chat template cannot write one of them, or writes the same for both.
        """
        renderers = self._chosen, self._rejected
        before = [copy.deepcopy(renderer.remarks) for renderer in renderers]
        try:
            return self._rendered(content, beside)
        except RecordError:  # of a record that is not taken nothing counts, of one answer neither
            for renderer, was in zip(renderers, before, strict=True):
                now = renderer.remarks
                now.ignored, now.control_tokens = was.ignored, was.control_tokens
                now.thinking = was.thinking
            raise

    def _rendered(self, content: AnswerPair, beside: Mapping[str, Any]) -> _Pair:
        plain = not isinstance(content.chosen, list)
        chosen = self._chosen.render(content.chosen, beside)
        rejected = self._rejected.render(content.rejected, beside)
        if chosen.text == rejected.text:
            raise RecordError(
                "'chosen' and 'rejected' are the same text once the chat template has written them"
            )
        return _Pair(chosen, rejected, plain)

    def encode(self, pairs: Sequence[_Pair]) -> list[_Ids]:
        """Ids and labels of each pair, empty where `max_length` leaves no two different answers."""
        found: dict[int, list[_Ids]] = {i: [] for i in range(len(pairs))}
        for plain, encoder in self._encoders.items():
            own = [i for i, pair in enumerate(pairs) if pair.plain == plain]
            texts = [text for i in own for text in (pairs[i].chosen, pairs[i].rejected)]
            for number, ids in enumerate(encoder.encode(texts) if texts else []):
                found[own[number // 2]].append(ids)
        return [self._joined(*both) for both in found.values()]

    def _joined(self, chosen: _Ids, rejected: _Ids) -> _Ids:
        cut = [tuple(part[: self._max_length] for part in one) for one in (chosen, rejected)]
        (ids, labels), (other_ids, other_labels) = cut
        kept = [count_targets(labels), count_targets(other_labels)]
        if not all(kept) or np.array_equal(ids, other_ids):
            return ids[:0], labels[:0]
        whole = [count_targets(chosen[1]), count_targets(rejected[1])]
        self.shortened += kept != whole
        marked = other_labels.copy()
        marked[0] = SECOND
        return np.concatenate([ids, other_ids]), np.concatenate([labels, marked])


def halves(example: Example) -> tuple[Example, Example]:
    """The chosen and the rejected sequence of a pair, with ids of their own."""
    split = int((example.labels == SECOND).argmax())
    labels = example.labels[split:].copy()
    labels[0] = NO_TARGET
    return (
        Example(2 * example.id, example.input_ids[:split], example.labels[:split]),
        Example(2 * example.id + 1, example.input_ids[split:], labels),
    )


@dataclass(frozen=True, slots=True)
class PairedBatch(Batch):
    """A micro-batch of B pairs in 2B rows, first all chosen answers, then all rejected ones.

    Attributes:
        counts: targets of each row.
    """

    counts: list[int] = field(default_factory=list)

    @property
    def weight(self) -> int:
        """The pairs."""
        return len(self.counts) // 2


def collate_pairs(examples: Sequence[Example], pad_id: int) -> PairedBatch:
    """One micro-batch; of no pairs, one row of padding."""
    pairs = [halves(example) for example in examples]
    rows = [row for side in zip(*pairs, strict=True) for row in side]
    plain = collate(rows, pad_id)
    known: dict[str, Any] = {name: getattr(plain, name) for name in Batch.__dataclass_fields__}
    return PairedBatch(**known, counts=[row.num_targets for row in rows])
