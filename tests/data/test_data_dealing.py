"""Micro-batches by tokens: every sequence once, within the limit, as few and as equal as can be."""

from __future__ import annotations

import numpy as np
import pytest

from dlora.data import Dealing, deal
from dlora.data.collate import in_eights


def lengths_of(count: int, seed: int = 0) -> list[int]:
    """Log-normal, as instruction data has them, 16 to 1024 tokens."""
    drawn = np.random.default_rng(seed).lognormal(4.8, 0.9, count)
    return [int(n) for n in np.clip(drawn, 16, 1024)]


@pytest.mark.parametrize("packs", [False, True])
@pytest.mark.parametrize("world", [1, 2, 3, 8])
@pytest.mark.parametrize("count", [0, 1, 5, 64, 200])
def test_each_sequence_once_and_no_more_tokens_than_allowed(
    packs: bool, world: int, count: int
) -> None:
    lengths, dealing = lengths_of(count), Dealing(4, 1024, packs)
    dealt = dealing(range(count), lengths, world)
    assert len(dealt) == world and len({len(mine) for mine in dealt}) == 1 and dealt[0]
    assert sorted(i for mine in dealt for micro in mine for i in micro) == [*range(count)]
    for mine in dealt:
        for micro in mine:
            assert dealing.places([lengths[i] for i in micro]) <= 1024
    assert dealt == dealing(range(count)[::-1], np.array(lengths), world)


@pytest.mark.parametrize("world", [1, 2, 8])
def test_packed_ones_are_as_few_as_can_be_and_equal(world: int) -> None:
    lengths, dealing = lengths_of(256), Dealing(4, 4096, packs=True)
    dealt = dealing(range(256), lengths, world)
    loads = [[sum(lengths[i] for i in micro) for micro in mine] for mine in dealt]
    least = -(-sum(lengths) // (world * 4096))
    assert least <= len(loads[0]) <= least + 1
    assert loads[0] == sorted(loads[0], reverse=True)  # the largest first
    together = np.array(loads)
    assert together.max() - together.min() <= 0.02 * together.max()


def test_padded_ones_are_neighbours_in_length() -> None:
    lengths, tokens = lengths_of(256), 4096
    dealing = Dealing(4, tokens)
    [mine] = dealing(range(256), lengths, 1)
    places = sum(dealing.places([lengths[i] for i in micro]) for micro in mine)
    assert places < 1.15 * sum(lengths)
    by_number = [deal(range(256), lengths, 1, len(range(256)) // len(mine))[0]]
    padded = max(dealing.places([lengths[i] for i in micro]) for micro in by_number[0])
    assert max(dealing.places([lengths[i] for i in micro]) for micro in mine) <= tokens < padded


def test_a_limit_is_a_multiple_of_eight() -> None:
    assert in_eights(13) == 16 and in_eights(16) == 16
    assert Dealing(4, 13, packs=True)(range(2), [9, 7], 1) == [[[0, 1]]]
    assert Dealing(4, 13, packs=True)(range(2), [9, 8], 1) == [[[0], [1]]]
    with pytest.raises(ValueError, match="17 tokens do not fit into 13"):
        Dealing(4, 13)([0], [17], 1)


def test_by_number_it_is_deal() -> None:
    lengths = lengths_of(20)
    assert Dealing(3)(range(20), lengths, 2) == deal(range(20), lengths, 2, 3)
    assert Dealing(3, packs=True).times(4) == Dealing(12, packs=True)
