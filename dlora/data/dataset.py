"""The data set: a source's records as token sequences, in three flat arrays."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from dlora.data.builtin import PREFIX
from dlora.data.chat import ChatRenderer, Rendered
from dlora.data.encode import Encoder, Example, Int32Array, count_targets
from dlora.data.files import Faults, Record, read_records
from dlora.data.formats import FORMATS, Conversation, RecordError
from dlora.errors import UsageError

_BATCH = 512  # texts per call of the tokenizer: enough for its threads, little in memory


@dataclass(frozen=True, slots=True)
class Report:
    """Statistics of a source's records. Lengths and targets are tokens of what was kept."""

    records: int
    kept: int
    dropped: int  # no target left within max_length
    shortened: int  # some of the targets cut off at max_length
    targets: int
    longest: int
    max_length: int
    skipped: int = 0  # beside the records above: what data.on_error: skip left out
    first_fault: str = ""
    most: int | None = None  # the first so many records were read

    def __str__(self) -> str:
        first = "the first " if self.most else ""
        return (
            f"{first}{self.records} records: {self.kept} kept with {self.targets} target tokens, "
            f"the longest has {self.longest} tokens; max_length {self.max_length} dropped "
            f"{self.dropped} (no answer left) and shortened "
            f"{self.shortened}{self._said_of_faults()}"
        )

    def _said_of_faults(self) -> str:
        if not self.skipped:
            return ""
        return f"; {self.skipped} more skipped (data.on_error), the first: {self.first_fault}"


class Dataset(Sequence[Example]):
    """Examples by position: `dataset[i].id == i`.

    Attributes:
        input_ids: int32 [T], all sequences one after the other.
        labels: int32 [T], likewise.
        starts: int64 [N + 1], where each begins.
        lengths: int64 [N], tokens of each sequence.
        fingerprint: SHA-256 (hex) over every sequence in order: its id and its length as
            little-endian int64, its input_ids and its labels as little-endian int32. Equal on
            ranks with equal data.
    """

    def __init__(
        self,
        input_ids: Int32Array,
        labels: Int32Array,
        starts: npt.NDArray[np.int64],
        report: Report,
    ):
        self._input_ids, self._labels, self._starts = input_ids, labels, starts
        for array in (input_ids, labels, starts):
            array.setflags(write=False)  # examples are views of these
        self.lengths = np.diff(starts)
        self.report = report
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
        return digest.hexdigest()


def load_examples(
    source: str | Sequence[str],
    *,
    key: str,
    format: str,
    tokenizer: Any,
    max_length: int,
    on_error: str = "stop",
    most: int | None = None,
) -> Dataset:
    """Reads and encodes a data source.

    Args:
        source: a file, a glob, a list of either, or "builtin:docstrings[-heldout]".
        key: "data.train" or "data.eval", for errors.
        format: a name in FORMATS; the builtin source takes "chat".
        tokenizer: a fast tokenizer of transformers, with a chat template unless format is "text".
        max_length: in tokens; longer sequences are cut on the right, and dropped if no target is
            left.
        on_error: "stop" at a record that cannot be used, or "skip" and count it.
        most: read no more than this many records that can be used; None: all.

    Raises:
        UsageError: with file and line: something that the user can correct.
    """
    faults = Faults(skip=on_error == "skip")
    contents = _contents(source, key, format, faults)
    encoder = Encoder(tokenizer, special_tokens=format == "text", key=key)
    renderer = ChatRenderer(tokenizer, key) if format != "text" else None
    texts = islice(_texts(contents, renderer, faults), most)

    ids: list[Int32Array] = []
    labels: list[Int32Array] = []
    records = dropped = shortened = 0
    while batch := list(islice(texts, _BATCH)):
        records += len(batch)
        for row, row_labels in encoder.encode(batch):
            targets = count_targets(row_labels[:max_length])
            if not targets:
                dropped += 1
                continue
            shortened += targets < count_targets(row_labels)
            ids.append(row[:max_length])
            labels.append(row_labels[:max_length])
    report = Report(
        records=records,
        kept=len(ids),
        dropped=dropped,
        shortened=shortened,
        targets=sum(map(count_targets, labels)),
        longest=max(map(len, ids), default=0),
        max_length=max_length,
        skipped=faults.count,
        first_fault=faults.first,
        most=most,
    )
    if not ids and faults.count and not records:
        raise UsageError(f"none of {faults.count} records can be used, the first: {faults.first}")
    if not ids:
        raise UsageError(
            f"{key}: none of {records} records has a target token within data.max_length "
            f"{max_length}; raise data.max_length or shorten the prompts"
        )
    starts = np.cumsum([0, *map(len, ids)], dtype=np.int64)
    return Dataset(np.concatenate(ids), np.concatenate(labels), starts, report)


def check_source(
    source: str | Sequence[str], *, key: str, format: str, on_error: str = "stop"
) -> None:
    """Raises the UsageErrors of `load_examples` that need no tokenizer: files, lines and fields."""
    for _ in _contents(source, key, format, Faults(skip=on_error == "skip")):
        pass


def _contents(
    source: str | Sequence[str], key: str, format: str, faults: Faults
) -> Iterator[tuple[Record, Conversation | str]]:
    """Every record of the source with what its format makes of it."""
    if format not in FORMATS:
        raise UsageError(f"data.format: {format!r} is unknown; expected one of {list(FORMATS)}")
    if isinstance(source, str) and source.startswith(PREFIX) and format != "chat":
        raise UsageError(
            f"data.format: {key} {source} contains chats; set it to chat, not {format}"
        )
    for record in read_records(source, key, faults):
        try:
            content = FORMATS[format].read(record.value)
        except RecordError as error:
            faults.add(UsageError(f"{record.where}: {error}"))
        else:
            yield record, content


def _texts(
    contents: Iterator[tuple[Record, Conversation | str]],
    renderer: ChatRenderer | None,
    faults: Faults,
) -> Iterator[Rendered]:
    """Every record as a text with spans."""
    for record, content in contents:
        if isinstance(content, str):
            yield Rendered(content, spans=None, append_eos=True)
            continue
        assert renderer is not None
        try:
            rendered = renderer.render(content)
        except RecordError as error:
            faults.add(UsageError(f"{record.where}: {error}"))
        else:
            yield rendered
