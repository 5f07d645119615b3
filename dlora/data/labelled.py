"""Labelled texts as sequences: with their class, or with the text that is to be written.

class     t0 t1 t2 </s>             its place among the labels stands at the last token
text      s0 s1 </s> t0 t1 </s>     the second is the target; each at most max_length tokens
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from dlora.data.encode import NO_TARGET, Int32Array
from dlora.data.formats import LabelledText, RecordError
from dlora.data.remarks import Remarks
from dlora.data.render import Renderer
from dlora.errors import UsageError

_MOST_LABELS = 10_000


def labels_of(
    found: Iterable[str], number: int | None, known: Sequence[str], key: str = "data.train"
) -> tuple[str, ...]:
    """The labels of a classification, in order.

    Args:
        found: the label of each record.
        number: how many there are; None: as many as are found.
        known: those of the base's configuration, if it has any of its own. Where they contain all
            that are found, they are taken, in their order.
        key: the configuration's name of the data set, for errors.

    Returns:
        Names in their order; of labels that are whole numbers, 0 … C − 1.

    Raises:
        UsageError: there are fewer than two, too many, or not `number`.
    """
    distinct = set(found)
    if known and distinct <= set(known):
        labels = list(known)
    elif all(label.isascii() and label.isdecimal() for label in distinct):
        largest = max(map(int, distinct), default=0)
        labels = [str(i) for i in range(min(max(number or 0, largest + 1), _MOST_LABELS + 1))]
    else:
        labels = sorted(distinct)
    if number is not None and len(labels) != number:
        raise UsageError(
            f"train.num_labels: is {number}, but {key} has {len(labels)}: {_shown(labels)}"
        )
    if not 2 <= len(labels) <= _MOST_LABELS:
        raise UsageError(
            f"{key}: has {len(labels)} labels ({_shown(labels)}); a classification takes 2 to "
            f"{_MOST_LABELS}"
        )
    return tuple(labels)


class LabelledTexts:
    """Reads and tokenizes labelled texts, with the tokens that a tokenizer puts around a text.

    Args:
        tokenizer: of transformers.
        key: the configuration's name of the data set, for errors.
        labels: of a classification, in order; none: a label is a text that is to be written.
        max_length: longer texts are cut, on the side that the tokenizer cuts.

    Attributes:
        remarks: of all records that were read.
        shortened: how many texts were cut.
    """

    def __init__(self, tokenizer: Any, key: str, labels: Sequence[str], max_length: int) -> None:
        self._tokenizer, self._max_length = tokenizer, max_length
        self._renderer = Renderer(tokenizer, key)
        self._place = {label: i for i, label in enumerate(labels)}
        self._ends: set[int] = set()
        self._special = set(tokenizer.all_special_ids)
        self.shortened = 0

    def limit(self, max_length: int) -> int:
        """Tokens of a sequence, which the tokenizer has cut already."""
        return 2 * max_length

    @property
    def remarks(self) -> Remarks:
        return self._renderer.remarks

    @property
    def ends(self) -> list[int]:
        """Ids that ended what is to be written so far."""
        return sorted(self._ends)

    def render(self, content: LabelledText, beside: Mapping[str, Any]) -> LabelledText:
        """The record as it is.

        Raises:
            RecordError: its label is none of the labels.
        """
        if self._place and content.label not in self._place:
            raise RecordError(
                f"'label' is {content.label!r}, which is none of the labels of data.train: "
                f"{_shown(list(self._place))}"
            )
        self._renderer.render(content.text, beside)
        if not self._place:  # a text as well
            self._renderer.render(content.label, {})
        return content

    def encode(self, records: Sequence[LabelledText]) -> list[tuple[Int32Array, Int32Array]]:
        """Ids and labels of each record."""
        texts = self._ids([record.text for record in records])
        if self._place:
            return [
                (ids, _at_the_end(ids, self._place[record.label]))
                for ids, record in zip(texts, records, strict=True)
            ]
        answers = self._ids([record.label for record in records], target=True)
        self._ends.update(int(ids[-1]) for ids in answers if len(ids) and ids[-1] in self._special)
        return [
            (
                np.concatenate([ids, answer]),
                np.concatenate([np.full_like(ids, NO_TARGET), answer]),
            )
            for ids, answer in zip(texts, answers, strict=True)
        ]

    def _ids(self, texts: list[str], *, target: bool = False) -> list[Int32Array]:
        """The ids of each text, at most `max_length`."""
        name, most = "text_target" if target else "text", self._max_length
        whole = self._tokenizer(**{name: texts}, verbose=False)["input_ids"]
        long = [i for i, ids in enumerate(whole) if len(ids) > most]
        if long:
            given = {name: [texts[i] for i in long]}
            cut = self._tokenizer(**given, truncation=True, max_length=most)["input_ids"]
            for i, ids in zip(long, cut, strict=True):
                whole[i] = ids
        self.shortened += len(long)
        eos = self._tokenizer.eos_token_id
        if target and eos is not None:  # not every tokenizer puts it behind a text
            for i in set(range(len(whole))) - set(long):
                if not whole[i] or whole[i][-1] not in self._special:
                    whole[i] = [*whole[i], eos][:most]
        return [np.asarray(ids, np.int32) for ids in whole]


def _at_the_end(ids: Int32Array, label: int) -> Int32Array:
    labels = np.full_like(ids, NO_TARGET)
    labels[-1:] = label
    return labels


def _shown(labels: Sequence[str]) -> str:
    more = ", ..." if len(labels) > 8 else ""
    return ", ".join(map(repr, labels[:8])) + more
