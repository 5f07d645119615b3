"""Machines with unlike numbers of ranks, as a scheduler may place them: one result, no deadlock."""

import functools
import os
from typing import Any

import pytest
from ranks import Pools, RankFailure
from run_training import Runs, check_near, train

from dlora.sharding.topology import Topology


@pytest.fixture(scope="module")
def command(words: Any) -> Any:
    return functools.partial(words, model="blocks", train__max_steps=3)


def place(sizes: list[int]) -> None:
    """Puts this rank on one of machines of so many ranks."""
    on_this_machine = [size for size in sizes for _ in range(size)][int(os.environ["RANK"])]
    os.environ["LOCAL_WORLD_SIZE"] = str(on_this_machine)


def placed(argv: list[str], sizes: list[int]) -> dict[str, Any]:
    place(sizes)
    return train(argv)


@pytest.mark.parametrize(
    ("sizes", "base"), [([2, 1, 1], "world"), ([2, 1, 1], "none"), ([3, 1], "world")]
)
def test_the_run_is_that_of_one_process(run: Runs, sizes: list[int], base: str) -> None:
    several = run("run", 4, work=placed, arguments=(sizes,), sharding__base=base)
    check_near(several, run("one", 1, sharding__base="none"))


def test_a_base_on_each_node_needs_nodes(run: Runs) -> None:
    """Where 1 alone divides all of them, every rank would hold the whole of it."""
    with pytest.raises(RankFailure, match=r"sharding\.base: node .* but one has 2, and others"):
        run("run", 4, work=placed, arguments=([2, 1, 1],), sharding__base="node")


def topology(sizes: list[int]) -> tuple[int, int]:
    """(ranks of a node, this rank's node) in a loop of one's own."""
    place(sizes)
    found = Topology.current()
    return found.ranks_per_node, found.node


@pytest.mark.parametrize(
    ("sizes", "wanted"),
    [([2, 1, 1], [(1, 0), (1, 1), (1, 2), (1, 3)]), ([2, 2], [(2, 0), (2, 0), (2, 1), (2, 1)])],
)
def test_every_rank_sees_the_same_nodes(
    pools: Pools, sizes: list[int], wanted: list[tuple[int, int]]
) -> None:
    assert pools(4).run(topology, sizes) == wanted
