"""The data set: a source's records as token sequences, in three flat arrays."""

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from types import MappingProxyType
from typing import Any, NamedTuple, overload

import numpy as np
import numpy.typing as npt

from dlora.data.columns import Columns
from dlora.data.encode import Encoder, Example, Int32Array, count_targets
from dlora.data.files import Sources, is_builtin, read_records, sources_of
from dlora.data.formats import (
    FORMATS,
    Continuation,
    Conversation,
    LabelledText,
    RecordError,
    read_record,
)
from dlora.data.formats.labelled import Labelled
from dlora.data.kinds import Faults, Record
from dlora.data.labelled import LabelledTexts
from dlora.data.render import Renderer
from dlora.data.report import Report
from dlora.data.sampler import Weights, are_plain
from dlora.errors import UsageError

NO_COLUMNS: Mapping[str, str] = MappingProxyType({})
# What a format makes of a record, and the fields beside it.
Content = tuple[Conversation | Continuation | LabelledText | str, Mapping[str, Any]]
_BATCH = 512  # texts per call of the tokenizer: enough for its threads, little in memory


class Dataset(Sequence[Example]):
    """Examples by position: `dataset[i].id == i`.

    Attributes:
        input_ids: int32 [T], all sequences one after the other.
        labels: int32 [T], likewise.
        starts: int64 [N + 1], where each begins.
        lengths: int64 [N], tokens of each sequence.
        fingerprint: SHA-256 (hex) over every sequence in order: its id and its length as
            little-endian int64, its input_ids and its labels as little-endian int32; then the
            weights, where they are not all 1. Equal on ranks with equal data.
        weights: ((stop, weight), ...): how often the sequences before each stop are shown.
    """

    def __init__(
        self,
        input_ids: Int32Array,
        labels: Int32Array,
        starts: npt.NDArray[np.int64],
        report: Report,
        weights: Weights = (),
    ):
        self._input_ids, self._labels, self._starts = input_ids, labels, starts
        for array in (input_ids, labels, starts):
            array.setflags(write=False)  # examples are views of these
        self.lengths = np.diff(starts)
        self.report = report
        self.weights = weights
        self.fingerprint = self._fingerprint()

    @property
    def arrays(self) -> tuple[Int32Array, Int32Array, npt.NDArray[np.int64]]:
        """(input_ids, labels, starts) as they were given."""
        return self._input_ids, self._labels, self._starts

    @property
    def largest_id(self) -> int:
        """The largest token id."""
        return int(self._input_ids.max())

    def __len__(self) -> int:
        return len(self._starts) - 1

    def first(self, count: int) -> list[Example]:
        """The first examples."""
        return self[:count]

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        position = range(len(self))[index]  # IndexError, and negative ones counted from the end
        start, stop = self._starts[position], self._starts[position + 1]
        return Example(position, self._input_ids[start:stop], self._labels[start:stop])

    def _fingerprint(self) -> str:
        digest = hashlib.sha256()
        for example in self:
            digest.update(np.array([example.id, len(example)], "<i8").tobytes())
            digest.update(example.input_ids.astype("<i4", copy=False).tobytes())
            digest.update(example.labels.astype("<i4", copy=False).tobytes())
        if not are_plain(self.weights):
            digest.update(repr(self.weights).encode("ascii"))
        return digest.hexdigest()


def load_examples(
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
) -> Dataset:
    """Reads and encodes a data source.

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

    Raises:
        UsageError: with file and line: something that the user can correct.
    """
    reading = Reading(
        source,
        key=key,
        format=format,
        tokenizer=tokenizer,
        max_length=max_length,
        on_error=on_error,
        most=most,
        columns=columns,
        labels=labels,
    )
    found = list(reading)
    reading.check()
    starts = np.cumsum([0, *(len(one.input_ids) for one in found)], dtype=np.int64)
    ids = np.concatenate([one.input_ids for one in found])
    targets = np.concatenate([one.labels for one in found])
    weights = weights_of(source, key, np.array([one.part for one in found]))
    return Dataset(ids, targets, starts, reading.report, weights)


def weights_of(source: Sources, key: str, parts: npt.NDArray[np.int64]) -> Weights:
    """The weights of a source's entries, each with the number of sequences up to its end.

    Args:
        parts: int64 [N], of which entry each sequence is; it never decreases.
    """
    if is_builtin(source):
        return ((len(parts), 1.0),)
    entries = sources_of(source, key)
    stops = np.searchsorted(parts, range(len(entries)), side="right")
    return tuple((int(stop), e.weight) for stop, e in zip(stops, entries, strict=True))


class Encoded(NamedTuple):
    """A sequence of a source, cut to max_length; `part` is the entry that it comes from."""

    input_ids: Int32Array
    labels: Int32Array
    part: int


class Reading:
    """One pass over a source: its sequences in their order, a few in memory at one time.

    Args: as for `load_examples`.

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
                self._longest = max(self._longest, len(ids[:limit]))
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
    """Raises the UsageErrors of `load_examples` that need no tokenizer: files, lines and fields."""
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
    if is_builtin(source) and format != "chat":
        raise UsageError(
            f"data.format: {key} {source} contains chats; set it to chat, not {format}"
        )
    for record in read_records(source, key, faults):
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
