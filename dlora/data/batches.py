"""The micro-batches of one rank, collated ahead by a thread while the model computes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any

from dlora.data.collate import Batch
from dlora.data.dataset import Dataset
from dlora.data.dealing import Dealing
from dlora.data.encode import Example
from dlora.data.sampler import Sampler
from dlora.data.stream import Stream, StreamSampler

Dealt = tuple[Any, "deque[Future[Batch]]"]


class Batches:
    """A context, in which a thread works one step ahead.

    Args:
        deal: makes the micro-batches of all ranks.
        collate: makes one of them.
        pinned: make them in memory that a GPU copies from without waiting.
    """

    def __init__(
        self,
        dataset: Dataset | Stream,
        sampler: Sampler | StreamSampler,
        *,
        rank: int,
        world: int,
        deal: Dealing,
        collate: Callable[[Sequence[Example]], Batch],
        pinned: bool = False,
    ) -> None:
        self._dataset, self._sampler = dataset, sampler
        self._rank, self._world, self._deal = rank, world, deal
        self._to_batch, self._pinned = collate, pinned
        self._thread = ThreadPoolExecutor(1, "dlora-batches")
        self._ahead: dict[int, Dealt] = {}

    def __enter__(self) -> Batches:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._thread.shutdown(cancel_futures=True)

    def step(self, step: int) -> tuple[Any, Iterator[Batch]]:
        """(ids of all sequences of a step, this rank's micro-batches), both in order."""
        ids, futures = self._ahead.pop(step) if step in self._ahead else self._begin(step)
        if step + 1 < self._sampler.total_steps and step + 1 not in self._ahead:
            self._ahead[step + 1] = self._begin(step + 1)
        return ids, _results(futures)

    def _begin(self, step: int) -> Dealt:
        ids = self._sampler.step(step)
        mine = self._deal(ids, self._dataset.lengths, self._world)[self._rank]
        micros = ([self._dataset[i] for i in micro] for micro in mine)
        return ids, deque(self._thread.submit(self._collate, micro) for micro in micros)

    def _collate(self, examples: list[Example]) -> Batch:
        batch = self._to_batch(examples)
        return batch.pinned() if self._pinned else batch


def _results(futures: deque[Future[Batch]]) -> Iterator[Batch]:
    while futures:
        yield futures.popleft().result()
