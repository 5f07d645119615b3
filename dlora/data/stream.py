"""A data set that is read while it is trained on: `data.streaming`.

    pass over the source ──Reading──> sequences 0, 1, 2, … in the order of the files
    W sequences          ──window───> shown as often as their weights say, in an order of their own
    windows, epoch after epoch ─────> one stream, cut into steps like `Sampler`'s

The seed, the epoch and the window's number decide its order, and neither the world size nor what
was read before; so every rank sees the same steps, and a run that resumes reads on to its position.
An id is the sequence's position in the pass, as in a data set that is in memory.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt

from dlora.data.encode import Example, longest_row
from dlora.data.files import Sources, resolve, sources_of
from dlora.data.kinds import KINDS
from dlora.data.reading import Encoded, Reading
from dlora.data.report import Report
from dlora.data.sampler import draw, permutation, shown
from dlora.errors import UsageError

_STEPS = 4  # whose sequences are in memory: the one that is trained on, and the next


class Stream:
    """The sequences of a source, of which a window is in memory; what `Dataset` is elsewhere.

    Args:
        source: what `data.train` takes, no builtin.
        window: sequences that are shuffled together.
        seed, shuffle: as for `Sampler`.
        settings: what `Reading` takes beside the source; its key is "data.train".

    Attributes:
        lengths: {id: tokens} of the sequences in memory.
        fingerprint: SHA-256 (hex) over the bytes of the source, the settings, the tokenizer, and
            the first window as it is encoded.
        report: what became of the records of the pass that is being made.
        check: called with (largest token id, most tokens) of each window.
        announce: called with the report of each pass that ends.

    Raises:
        UsageError: as `load_examples`, for the records of the first window.
    """

    def __init__(
        self, source: Sources, *, window: int, seed: int, shuffle: bool, **settings: Any
    ) -> None:
        self._source, self._settings = source, settings
        self._window, self._seed, self._shuffle = window, seed, shuffle
        self._weights = [entry.weight for entry in sources_of(source, "data.train")]
        self._held: dict[int, Example] = {}
        self.lengths: dict[int, int] = {}
        self.check: Callable[[int, int], None] = lambda largest, longest: None
        self.announce: Callable[[str], None] = lambda line: None
        self._reading = self._pass()
        self._first = list(islice(self._reading, window))
        self._reading.check()
        self.fingerprint = self._fingerprint()

    @property
    def report(self) -> Report:
        return self._reading.report

    @property
    def largest_id(self) -> int:
        """The largest token id of the first window."""
        return _extent(self._first)[0]

    def __getitem__(self, index: int) -> Example:
        return self._held[index]

    def first(self, count: int) -> list[Example]:
        """The first sequences of the source, at most a window of them."""
        return [_example(i, one) for i, one in enumerate(self._first[:count])]

    def hold(self, examples: list[Example]) -> None:
        """Have these sequences in memory, and no others."""
        self._held = {example.id: example for example in examples}
        self.lengths = {example.id: len(example) for example in examples}

    def count(self) -> int:
        """Sequences that an epoch shows, by a pass over the whole source."""
        reading = self._reading = self._pass()
        sizes = np.zeros(len(self._weights), np.int64)
        for one in reading:
            sizes[one.part] += 1
            self.check(*_extent([one]))
        pairs = zip(sizes.tolist(), self._weights, strict=True)
        return sum(size * int(weight) + shown(size, weight) for size, weight in pairs)

    def epoch(self, epoch: int) -> Iterator[list[Example]]:
        """The windows of an epoch, each in the order in which it is shown."""
        reading = self._reading = self._pass()
        rows = iter(reading)
        read, start, number = np.zeros(len(self._weights), np.int64), 0, 0
        while window := list(islice(rows, self._window)):
            self.check(*_extent(window))
            key = f"{self._seed}:{epoch}:{number}"
            order = self._order(np.array([one.part for one in window]), read, key)
            yield [_example(start + i, window[i]) for i in order.tolist()]
            start, number = start + len(window), number + 1
        reading.check()
        self.announce(f"data.train: epoch {epoch + 1}: {reading.report}")

    def _order(
        self, parts: npt.NDArray[np.int64], read: npt.NDArray[np.int64], key: str
    ) -> npt.NDArray[np.int64]:
        """Positions in a window, as they are shown.

        Args:
            parts: int64 [W], of which entry each sequence is.
            read: int64 [entries], sequences of earlier windows; counts on.
        """
        shows = []
        for part in np.unique(parts).tolist():
            members, weight = np.flatnonzero(parts == part), self._weights[part]
            size = shown(len(members), weight, int(read[part]))
            drawn = members[draw(len(members), size, f"{key}:{part}")] if size else members[:0]
            shows += [np.tile(members, int(weight)), drawn]
            read[part] += len(members)
        positions = np.concatenate(shows)
        return positions[permutation(len(positions), key)] if self._shuffle else positions

    def _pass(self) -> Reading:
        return Reading(self._source, key="data.train", **self._settings)

    def _fingerprint(self) -> str:
        places = [KINDS[place.kind].digest(place) for place in resolve(self._source, "data.train")]
        tokenizer, settings = self._settings["tokenizer"], dict(self._settings)
        settings["tokenizer"] = [tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template]
        parts = [places, sorted(settings.items()), self._weights, self._window, self._shuffle]
        digest = hashlib.sha256(json.dumps(parts, default=str).encode("utf-8"))
        for one in self._first:
            digest.update(np.array([one.part, len(one.input_ids)], "<i8").tobytes())
            digest.update(one.input_ids.astype("<i4").tobytes())
            digest.update(one.labels.astype("<i4").tobytes())
        return digest.hexdigest()


class StreamSampler:
    """The steps of a stream, one after the other; what `Sampler` is elsewhere.

    Args:
        stream: what is read.
        global_batch_size, max_steps, epochs: as for `Sampler`. `epochs` makes a pass over the whole
            source at once, since the number of steps depends on it.
    """

    def __init__(
        self,
        stream: Stream,
        global_batch_size: int,
        max_steps: int | None = None,
        epochs: int | None = None,
    ) -> None:
        self._stream, self._epoch_size = stream, 0  # of sequences; 0: not known yet
        self.global_batch_size = global_batch_size
        if epochs is not None:
            self._epoch_size = self._counted(stream.count())
            self._end = epochs * self._epoch_size
        else:
            self._end = (max_steps or 0) * global_batch_size
        self._steps: dict[int, list[Example]] = {}
        self._next = 0
        self._flow = self._from(0)

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return -(-self._end // self.global_batch_size)

    def sequences(self, steps: int) -> int:
        """How many sequences the first `steps` steps take from the stream."""
        return min(steps * self.global_batch_size, self._end)

    def step(self, t: int) -> list[int]:
        """Ids of the sequences of optimizer step t, counted from 0, in stream order.

        They are in the stream's memory until some steps later. Any step but the next one, and the
        last few, is read on to from the start of its epoch, or of the stream.
        """
        if not 0 <= t < self.total_steps:
            raise IndexError(f"step {t} is outside of a run of {self.total_steps} steps")
        if t not in self._steps:
            if t != self._next:
                self._steps, self._flow = {}, self._from(self.sequences(t))
            size = self.sequences(t + 1) - self.sequences(t)
            self._steps[t] = list(islice(self._flow, size))
            self._next = t + 1
            for old in [step for step in self._steps if step <= t - _STEPS]:
                del self._steps[old]
            self._stream.hold([one for examples in self._steps.values() for one in examples])
        return [example.id for example in self._steps[t]]

    def _from(self, position: int) -> Iterator[Example]:
        """The stream from a position on."""
        size = self._epoch_size
        epoch, skipped = divmod(position, size) if size else (0, position)
        while True:
            count = 0
            for window in self._stream.epoch(epoch):
                count += len(window)
                yield from window[skipped:]
                skipped = max(0, skipped - len(window))
            self._epoch_size = self._counted(count)
            further, skipped = divmod(skipped, self._epoch_size)
            epoch += 1 + further

    @staticmethod
    def _counted(size: int) -> int:
        if not size:
            raise UsageError("data.train: the weights show no record in any epoch; raise them")
        return size


def _example(position: int, one: Encoded) -> Example:
    return Example(position, one.input_ids, one.labels)


def _extent(window: list[Encoded]) -> tuple[int, int]:
    """(largest token id, most tokens of a row) of sequences."""
    return max(int(one.input_ids.max()) for one in window), max(
        longest_row(one.labels) for one in window
    )
