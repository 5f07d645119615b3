"""Which sequences make up which optimizer step, and which rank works on which of them.

The order is one endless stream: epoch 0's permutation, then epoch 1's, and so on. An epoch shows
each sequence once, or as often as its weight says. Step t takes the
stream's positions [t G, (t + 1) G), G the global batch size, across the ends of epochs. Neither the
world size nor the micro-batch size enters, so a step has the same sequences on any machine, and
a run resumes from the number of its step alone. `deal` then divides a step over the ranks.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from dlora.errors import UsageError

# ((stop, weight), ...): the sequences before each stop, from the one before on, are shown `weight`
# times an epoch. Empty: all of them once.
Weights = tuple[tuple[int, float], ...]


def are_plain(weights: Weights) -> bool:
    """Whether every sequence is shown once an epoch."""
    return all(weight == 1 for _, weight in weights)


def shown(count: int, weight: float, before: int = 0) -> int:
    """How many of `count` sequences an epoch shows beyond the whole part of `weight`.

    Args:
        before: sequences of the same entry that came earlier; roundings add up over them.
    """
    fraction = weight - int(weight)
    return int((before + count) * fraction + 0.5) - int(before * fraction + 0.5)


class Sampler:
    """The global order of a data set's sequences.

    Args:
        num_examples: sequences in the data set, >= 1.
        global_batch_size: sequences per optimizer step, >= 1. A step larger than the data set has
            sequences of several epochs.
        seed: decides every epoch's permutation.
        shuffle: False takes the data set's own order in every epoch.
        max_steps: optimizer steps of the run; exactly one of it and `epochs` is set.
        epochs: passes over the data set; the last step may be smaller.
        weights: of the sequences. The whole part of a weight shows each of its sequences so many
            times; its fraction shows that share of them once more, drawn anew for every epoch.

    Raises:
        UsageError: no sequence with some weight is ever shown.
    """

    def __init__(
        self,
        num_examples: int,
        global_batch_size: int,
        seed: int,
        shuffle: bool,
        max_steps: int | None = None,
        epochs: int | None = None,
        weights: Weights = (),
    ):
        if num_examples < 1 or global_batch_size < 1:
            raise ValueError(f"no examples ({num_examples}) or empty steps ({global_batch_size})")
        if (max_steps is None) == (epochs is None):
            raise ValueError(f"set one of max_steps ({max_steps}) and epochs ({epochs})")
        self.num_examples = num_examples
        self._parts = () if are_plain(weights) else tuple(_parts(weights))
        sizes = (int(w) * len(part) + shown(len(part), w) for part, w in self._parts)
        self.per_epoch = sum(sizes) if self._parts else num_examples
        self.global_batch_size = global_batch_size
        self.seed = seed
        self.shuffle = shuffle
        if epochs is not None:
            self._end = epochs * self.per_epoch
        else:
            self._end = (max_steps or 0) * global_batch_size

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return -(-self._end // self.global_batch_size)

    def sequences(self, steps: int) -> int:
        """How many sequences the first `steps` steps take from the stream."""
        return min(steps * self.global_batch_size, self._end)

    def step(self, t: int) -> list[int]:
        """Ids of the sequences of optimizer step t, counted from 0, in stream order."""
        if not 0 <= t < self.total_steps:
            raise IndexError(f"step {t} is outside of a run of {self.total_steps} steps")
        position = t * self.global_batch_size
        stop = min(position + self.global_batch_size, self._end)
        ids: list[int] = []
        while position < stop:
            epoch, index = divmod(position, self.per_epoch)
            taken = self._epoch(epoch)[index : index + stop - position]
            ids += taken.tolist()
            position += len(taken)
        return ids

    def _epoch(self, epoch: int) -> npt.NDArray[np.int64]:
        if self._parts:
            return _weighted(self._parts, self.seed, epoch, self.shuffle)
        if not self.shuffle:
            return np.arange(self.num_examples)
        return epoch_order(self.num_examples, self.seed, epoch)


def _parts(weights: Weights) -> Iterator[tuple[range, float]]:
    """(ids, weight) of each entry that has sequences."""
    start = 0
    for stop, weight in weights:
        if stop > start:
            if not int(weight) and not shown(stop - start, weight):
                raise UsageError(
                    f"data.train: weight {weight} shows none of {stop - start} records in any "
                    "epoch; raise it or leave the entry out"
                )
            yield range(start, stop), weight
        start = stop


@lru_cache(maxsize=2)  # across the end of an epoch
def _weighted(
    parts: tuple[tuple[range, float], ...], seed: int, epoch: int, shuffle: bool
) -> npt.NDArray[np.int64]:
    """The ids of an epoch; without shuffling, entry after entry, each in passes of its own."""
    ids = np.concatenate(
        [
            np.concatenate([np.tile(part, int(weight)), part.start + drawn])
            for number, (part, weight) in enumerate(parts)
            for drawn in [draw(len(part), shown(len(part), weight), f"{seed}:{epoch}:{number}")]
        ]
    ).astype(np.int64)
    return ids[epoch_order(len(ids), seed, epoch)] if shuffle else ids


def draw(count: int, size: int, key: str) -> npt.NDArray[np.int64]:
    """`size` different numbers below `count`, ascending, drawn by the key."""
    return np.sort(permutation(count, key)[:size])


@lru_cache(maxsize=4)  # training and evaluation, each across the end of an epoch
def epoch_order(num_examples: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """Permutation of range(num_examples) for an epoch of a seed, int64, read-only."""
    order = permutation(num_examples, f"{seed}:{epoch}")
    order.setflags(write=False)
    return order


def permutation(count: int, key: str) -> npt.NDArray[np.int64]:
    """Permutation of range(count), int64.

    The stable order of `count` raw 64-bit outputs of PCG64, seeded by the SHA-256 of the key, such
    as "seed:epoch". Raw outputs are the part of NumPy's generators that never changes, across
    platforms and versions; its `permutation` may.
    """
    digest = hashlib.sha256(key.encode("ascii")).digest()
    raw = np.random.PCG64(int.from_bytes(digest, "big")).random_raw(count)
    return np.argsort(raw, kind="stable").astype(np.int64)


def batch_hash(ids: Sequence[int]) -> str:
    """SHA-256 (hex) of a step's ids: sorted, in decimal, joined by commas, ASCII: "3,17,17,240"."""
    return hashlib.sha256(",".join(map(str, sorted(ids))).encode("ascii")).hexdigest()


def deal(
    ids: Sequence[int],
    lengths: Mapping[int, int] | Sequence[int] | npt.NDArray[np.int64],
    world_size: int,
    micro_batch_size: int,
) -> list[list[list[int]]]:
    """Divides a step's sequences: deal(...)[rank][k] are the ids of that rank's k-th micro-batch.

    Args:
        ids: G sequences; each is dealt out once.
        lengths: by id, `lengths[id]` in tokens.

    Every rank gets m = ceil(ceil(G / world_size) / micro_batch_size) micro-batches. The sequences
    are sorted by length, then id, and cut into world_size * m runs whose sizes differ by at most
    one, the larger ones first, where sequences are short. The k-th micro-batches of all ranks are
    neighbouring runs: little padding, and ranks that gather W0 together have equal work. Where
    there are fewer sequences than runs, the last runs are empty: passes of weight zero.
    """
    if world_size < 1 or micro_batch_size < 1:
        raise ValueError(f"no ranks ({world_size}) or empty micro-batches ({micro_batch_size})")
    micros = -(-len(ids) // (world_size * micro_batch_size))
    runs = world_size * micros
    ordered = sorted(ids, key=lambda i: (lengths[i], i))
    size, larger = divmod(len(ordered), runs) if runs else (0, 0)
    cuts = [run * size + min(run, larger) for run in range(runs + 1)]
    return [
        [ordered[cuts[run] : cuts[run + 1]] for run in range(rank, runs, world_size)]
        for rank in range(world_size)
    ]
