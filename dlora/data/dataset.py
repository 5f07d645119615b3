"""The data set: a source's records as token sequences, in three flat arrays."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from dlora.data.encode import Example, Int32Array
from dlora.data.files import Sources, is_builtin, sources_of
from dlora.data.reading import Reading
from dlora.data.report import Report
from dlora.data.sampler import Weights, are_plain


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
    def about(self) -> dict[str, str]:
        """What there is beside the arrays; `of` takes it."""
        said = {"fingerprint": self.fingerprint, "report": json.dumps(asdict(self.report))}
        return said | {"weights": json.dumps(self.weights)}

    @classmethod
    def of(cls, arrays: Sequence[npt.NDArray[Any]], about: Mapping[str, str]) -> "Dataset":
        """The data set with these `arrays` and all that is `about` it.

        Raises:
            ValueError, TypeError, KeyError, IndexError: it is not what was given away.
        """
        ids, labels, starts = arrays
        weights = tuple((int(stop), float(w)) for stop, w in json.loads(about["weights"]))
        dataset = cls(ids, labels, starts, Report(**json.loads(about["report"])), weights)
        if dataset.fingerprint != about["fingerprint"]:
            raise ValueError("the arrays are not those of the fingerprint")
        return dataset

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


def load_examples(source: Sources, *, key: str, **settings: Any) -> Dataset:
    """Read and encode a data source.

    Args: as for `Reading`.

    Raises:
        UsageError: with file and line: something that the user can correct.
    """
    reading = Reading(source, key=key, **settings)
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
