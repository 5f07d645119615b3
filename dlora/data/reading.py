"""One pass over a data source: its records, one after the other, as token sequences."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from types import MappingProxyType
from typing import Any, NamedTuple

from dlora.data.builtin import as_pairs
from dlora.data.columns import Columns
from dlora.data.encode import Encoder, Int32Array, count_targets, longest_row
from dlora.data.files import Sources, is_builtin, read_records
from dlora.data.formats import (
    FORMATS,
    AnswerPair,
    Continuation,
    Conversation,
    LabelledText,
    RecordError,
    read_record,
)
from dlora.data.formats.labelled import Labelled
from dlora.data.formats.preference import PreferenceFormat
from dlora.data.kinds import Faults, Record
from dlora.data.labelled import LabelledTexts
from dlora.data.pairs import AnswerPairs
from dlora.data.render import Renderer
from dlora.data.report import Report
from dlora.errors import UsageError

NO_COLUMNS: Mapping[str, str] = MappingProxyType({})
# What a format makes of a record, and the fields beside it.
Read = Conversation | Continuation | LabelledText | AnswerPair | str
Content = tuple[Read, Mapping[str, Any]]
_BATCH = 512  # texts per call of the tokenizer: enough for its threads, little in memory


class Encoded(NamedTuple):
    """A sequence of a source, cut to max_length; `part` is the entry that it comes from."""

    input_ids: Int32Array
    labels: Int32Array
    part: int


class Reading:
    """One pass over a source: its sequences in their order, a few in memory at one time.

    Args:
        source: what `data.train` takes.
        key: "data.train" or "data.eval", for errors.
        format: a name in FORMATS; the builtin source takes "chat".
        tokenizer: a fast tokenizer of transformers, with a chat template unless format is "text".
        max_length: in tokens; longer sequences are cut on the right, and dropped if no target is
            left.
        on_error: "stop" at a record that cannot be used, or "skip" and count it.
        most: read no more than this many records that can be used; None: all.
        columns: see `Columns`.
        labels: of a classification, whose format is "labelled": their names in order.

    Attributes:
        report: what became of the records that have been read so far.
    """

    def __init__(
        self,
        source: Sources,
        *,
        key: str,
        format: str,
        tokenizer: Any,
        max_length: int,
        on_error: str = "stop",
        most: int | None = None,
        columns: Mapping[str, str] = NO_COLUMNS,
        labels: Sequence[str] = (),
    ) -> None:
        self._key, self._max_length, self._most = key, max_length, most
        self._faults = Faults(skip=on_error == "skip")
        self._columns = Columns(columns, format)
        contents = _contents(source, key, format, self._faults, self._columns)
        self._renderer: Any
        self._encoder: Any
        if format == Labelled.name:
            self._renderer = self._encoder = LabelledTexts(tokenizer, key, labels, max_length)
        elif format == PreferenceFormat.name:
            self._renderer = self._encoder = AnswerPairs(tokenizer, key, max_length)
        else:
            self._encoder = Encoder(tokenizer, special_tokens=format == "text", key=key)
            self._renderer = Renderer(tokenizer, key)
            if format != "text":
                self._renderer.chats()  # a template that cannot be used fails before the records
        self._texts = islice(_texts(contents, self._renderer, self._faults), most)
        self._counts: Counter[str] = Counter()
        self._longest = 0

    def __iter__(self) -> Iterator[Encoded]:
        counts, limit = self._counts, self._encoder.limit(self._max_length)
        while batch := list(islice(self._texts, _BATCH)):
            counts["records"] += len(batch)
            self._columns.check_read(self._renderer.remarks.ignored)
            encoded = self._encoder.encode([text for text, _ in batch])
            for (ids, labels), (_, part) in zip(encoded, batch, strict=True):
                targets = count_targets(labels[:limit])
                if not targets:
                    counts["dropped"] += 1
                    continue
                counts["kept"] += 1
                counts["targets"] += targets
                counts["shortened"] += targets < count_targets(labels)
                self._longest = max(self._longest, longest_row(labels[:limit]))
                yield Encoded(ids[:limit], labels[:limit], part)
        if self._most is None:
            self._columns.check_seen(self._key)

    @property
    def report(self) -> Report:
        remarks = self._renderer.remarks
        named = ("records", "kept", "dropped", "targets")
        return Report(
            **{name: self._counts[name] for name in named},
            shortened=self._counts["shortened"] + self._encoder.shortened,
            longest=self._longest,
            max_length=self._max_length,
            skipped=self._faults.count,
            first_fault=self._faults.first,
            most=self._most,
            ignored=dict(remarks.ignored),
            control_tokens=dict(remarks.control_tokens),
            left_out_thinking=remarks.thinking,
            ends=self._encoder.ends,
        )

    def check(self) -> None:
        """Raise a `UsageError` if the pass found nothing to train on."""
        said, faults = self.report, self._faults
        if not said.kept and faults.count and not said.records:
            raise UsageError(
                f"none of {faults.count} records can be used, the first: {faults.first}"
            )
        if not said.kept:
            raise UsageError(
                f"{self._key}: none of {said.records} records has a target token within "
                f"data.max_length {self._max_length}; raise data.max_length or shorten the prompts"
            )


def check_source(
    source: Sources,
    *,
    key: str,
    format: str,
    on_error: str = "stop",
    columns: Mapping[str, str] = NO_COLUMNS,
) -> None:
    """Raise the UsageErrors of a reading that need no tokenizer: files, lines and fields."""
    faults = Faults(skip=on_error == "skip")
    for _ in _contents(source, key, format, faults, Columns(columns, format)):
        pass


def labels_in(
    source: Sources, *, key: str, on_error: str, columns: Mapping[str, str]
) -> Iterator[str]:
    """The label of each labelled text of a source, by a pass of its own."""
    faults, format = Faults(skip=on_error == "skip"), Labelled.name
    for _, (content, _) in _contents(source, key, format, faults, Columns(columns, format)):
        assert isinstance(content, LabelledText)
        yield content.label


def _contents(
    source: Sources, key: str, format: str, faults: Faults, columns: Columns
) -> Iterator[tuple[Record, Content]]:
    """Every record of the source with what its format makes of it."""
    if format not in FORMATS:
        raise UsageError(f"data.format: {format!r} is unknown; expected one of {list(FORMATS)}")
    if is_builtin(source) and format not in ("chat", PreferenceFormat.name):
        raise UsageError(
            f"data.format: {key} {source} contains chats; set it to chat, not {format}"
        )
    records = read_records(source, key, faults)
    if is_builtin(source) and format == PreferenceFormat.name:
        found = list(records)
        pairs = as_pairs([record.value for record in found])
        records = (replace(r, value=pair) for r, pair in zip(found, pairs, strict=True))
    for record in records:
        try:
            content = read_record(format, columns(record.value))
        except RecordError as error:
            faults.add(UsageError(f"{record.where}: {error}{columns.missing(record.value)}"))
        else:
            yield record, content


def _texts(
    contents: Iterator[tuple[Record, Content]], renderer: Any, faults: Faults
) -> Iterator[tuple[Any, int]]:
    """Every record as its encoder takes it, and the entry that it comes from."""
    for record, (content, beside) in contents:
        try:
            rendered = renderer.render(content, beside)
        except RecordError as error:
            faults.add(UsageError(f"{record.where}: {error}"))
        else:
            yield rendered, record.part
