"""The global order and the dealing, as properties and against a plain reading of the contract."""

import hashlib
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dlora.data import Sampler, batch_hash, deal
from dlora.data.sampler import epoch_order
from dlora.errors import UsageError

SMALL = settings(max_examples=100, deadline=None, derandomize=True)


@SMALL
@given(
    examples=st.integers(1, 40),
    batch=st.integers(1, 90),
    seed=st.integers(0, 2**40),
    epochs=st.integers(1, 4),
    shuffle=st.booleans(),
)
def test_a_run_of_epochs_is_whole_epochs_cut_into_steps(
    examples: int, batch: int, seed: int, epochs: int, shuffle: bool
):
    sampler = Sampler(examples, batch, seed, shuffle, epochs=epochs)
    steps = [sampler.step(t) for t in range(sampler.total_steps)]
    stream = [i for step in steps for i in step]
    assert len(stream) == examples * epochs
    for epoch in range(epochs):
        part = stream[epoch * examples : (epoch + 1) * examples]
        assert sorted(part) == list(range(examples))
        assert shuffle or part == list(range(examples))
    assert all(len(step) == batch for step in steps[:-1])
    assert 1 <= len(steps[-1]) <= batch

    # max_steps takes the same stream, its last step whole.
    longer = Sampler(examples, batch, seed, shuffle, max_steps=sampler.total_steps)
    assert longer.total_steps == sampler.total_steps
    # Random access: any step, without those before it.
    for t in reversed(range(longer.total_steps)):
        step = longer.step(t)
        assert len(step) == batch
        assert step[: len(steps[t])] == steps[t]


def test_epochs_differ_and_the_seed_decides():
    def stream(seed: int) -> list[int]:
        return Sampler(50, 50, seed, True, max_steps=2).step(0)

    first, second = (Sampler(50, 50, 7, True, epochs=2).step(t) for t in (0, 1))
    assert first != second
    assert first == stream(7) != stream(8)


def test_the_permutation_is_fixed_for_all_time():
    """Recomputed here, and pinned: a changed order would change every resumed run."""
    key = int.from_bytes(hashlib.sha256(b"3:2").digest(), "big")
    raw = np.random.PCG64(key).random_raw(10).tolist()
    assert epoch_order(10, 3, 2).tolist() == sorted(range(10), key=lambda i: raw[i])
    assert epoch_order(10, 3, 2).tolist() == [6, 7, 3, 8, 2, 1, 4, 0, 9, 5]


@pytest.mark.parametrize("t", [-1, 3])
def test_there_is_no_step_outside_the_run(t: int):
    with pytest.raises(IndexError, match=f"step {t} is outside of a run of 3 steps"):
        Sampler(5, 2, 0, True, max_steps=3).step(t)


@pytest.mark.parametrize(
    "arguments",
    [
        {"num_examples": 0, "max_steps": 1},
        {"global_batch_size": 0, "max_steps": 1},
        {},
        {"max_steps": 1, "epochs": 1},
    ],
)
def test_wrong_arguments(arguments: dict[str, Any]):
    defaults = {"num_examples": 1, "global_batch_size": 1, "seed": 0, "shuffle": True}
    with pytest.raises(ValueError, match=r"no examples|set one of"):
        Sampler(**{**defaults, **arguments})


def test_no_steps():
    assert Sampler(5, 2, 0, True, max_steps=0).total_steps == 0


def test_batch_hash_is_over_the_sorted_ids():
    expected = hashlib.sha256(b"3,17,17,240").hexdigest()
    assert batch_hash([17, 240, 3, 17]) == batch_hash([3, 17, 17, 240]) == expected
    assert batch_hash(np.array([3, 240, 17, 17]).tolist()) == expected
    assert len({batch_hash(ids) for ids in ([1, 2], [12], [1], [], [1, 1, 2])}) == 5


@SMALL
@given(data=st.data(), world=st.integers(1, 9), micro=st.integers(1, 9), total=st.integers(0, 70))
def test_deal(data: Any, world: int, micro: int, total: int):
    lengths = data.draw(st.lists(st.integers(2, 12), min_size=20, max_size=20))
    ids = data.draw(st.lists(st.integers(0, 19), min_size=total, max_size=total))
    dealt = deal(ids, lengths, world, micro)

    per_rank = -(-total // world)
    assert [len(rank) for rank in dealt] == [-(-per_rank // micro)] * world
    everything = [i for rank in dealt for run in rank for i in run]
    assert Counter(everything) == Counter(ids)
    sizes = [len(run) for rank in dealt for run in rank]
    assert max(sizes, default=0) <= micro
    assert max(sizes, default=0) - min(sizes, default=0) <= 1

    # Slot by slot over the ranks, the lengths only grow: neighbours work on similar lengths.
    slots = [dealt[rank][k] for k in range(len(dealt[0])) for rank in range(world)]
    flat = [(lengths[i], i) for run in slots for i in run]
    assert flat == sorted(flat)
    # Neither the order of the ids nor the kind of `lengths` matters.
    shuffled = data.draw(st.permutations(ids))
    assert deal(shuffled, np.array(lengths), world, micro) == dealt


def test_deal_of_a_small_step_leaves_ranks_empty():
    assert deal([5, 3, 4], [9] * 6, 2, 1) == [[[3], [5]], [[4], []]]
    assert deal([1], [9] * 6, 3, 4) == [[[1]], [[]], [[]]]


@pytest.mark.parametrize(("world", "micro"), [(0, 1), (1, 0)])
def test_deal_refuses_no_ranks_and_no_sequences(world: int, micro: int):
    with pytest.raises(
        ValueError, match=rf"no ranks \({world}\) or empty micro-batches \({micro}\)"
    ):
        deal([0], [1], world, micro)


@pytest.mark.parametrize("micro", [1, 3, 4])
def test_a_step_is_the_same_on_any_number_of_ranks(micro: int):
    lengths = [2 + (i * 7) % 13 for i in range(23)]
    sampler = Sampler(23, 10, 0, True, epochs=2)
    for t in range(sampler.total_steps):
        hashes = {
            batch_hash([i for rank in dealt for run in rank for i in run])
            for dealt in (deal(sampler.step(t), lengths, world, micro) for world in (1, 2, 3, 4))
        }
        assert hashes == {batch_hash(sampler.step(t))}


@SMALL
@given(
    sizes=st.lists(st.integers(1, 12), min_size=1, max_size=4),
    weights=st.lists(st.sampled_from([0.25, 0.5, 1, 1.5, 2, 3.25]), min_size=4, max_size=4),
    batch=st.integers(1, 30),
    seed=st.integers(0, 2**40),
    shuffle=st.booleans(),
)
def test_each_sequence_is_shown_as_often_as_its_weight_says(
    sizes: list[int], weights: list[float], batch: int, seed: int, shuffle: bool
):
    """⌊w⌋ or ⌈w⌉ times, and an entry's shows add up to w times its size, rounded."""
    parts = list(zip(np.cumsum(sizes).tolist(), weights, strict=False))
    wanted = [
        int(w) * n + int((w - int(w)) * n + 0.5) for n, w in zip(sizes, weights, strict=False)
    ]
    if not all(wanted):
        with pytest.raises(UsageError, match="shows none of . records in any epoch"):
            Sampler(sum(sizes), batch, seed, shuffle, epochs=1, weights=tuple(parts))
        return
    sampler = Sampler(sum(sizes), batch, seed, shuffle, epochs=3, weights=tuple(parts))
    stream = [i for t in range(sampler.total_steps) for i in sampler.step(t)]
    assert len(stream) == 3 * sum(wanted)
    for epoch in range(3):
        shows = Counter(stream[epoch * sum(wanted) : (epoch + 1) * sum(wanted)])
        start = 0
        for (stop, weight), total in zip(parts, wanted, strict=True):
            times = [shows[i] for i in range(start, stop)]
            assert sum(times) == total
            assert {int(weight), int(np.ceil(weight))} >= set(times)
            start = stop


def test_fractions_are_drawn_anew_for_every_epoch_and_by_the_seed():
    def drawn(seed: int, epoch: int) -> list[int]:
        sampler = Sampler(40, 20, seed, False, max_steps=9, weights=((40, 0.5),))
        return sampler.step(epoch)

    assert drawn(0, 0) == sorted(drawn(0, 0)) and len(set(drawn(0, 0))) == 20
    assert len({tuple(drawn(seed, epoch)) for seed in (0, 1) for epoch in (0, 1, 2)}) == 6


def test_weights_of_one_change_nothing():
    plain = Sampler(40, 7, 3, True, max_steps=20)
    weighted = Sampler(40, 7, 3, True, max_steps=20, weights=((10, 1.0), (40, 1.0)))
    assert [plain.step(t) for t in range(20)] == [weighted.step(t) for t in range(20)]
