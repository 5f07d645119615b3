"""Machines with unlike numbers of ranks, as a scheduler may place them: one result, no deadlock."""

import functools
import os
from pathlib import Path
from typing import Any

import pytest
from ranks import Pools, RankFailure
from run_training import figures, same_bits, train

from dlora.sharding.topology import Topology


@pytest.fixture
def command(words: Any) -> Any:
    return functools.partial(words, model="blocks", train__max_steps=3)


def placed(sizes: list[int], argv: list[str]) -> dict[str, Any]:
    """`train`, on machines of so many ranks."""
    on_this_machine = [size for size in sizes for _ in range(size)][int(os.environ["RANK"])]
    os.environ["LOCAL_WORLD_SIZE"] = str(on_this_machine)
    return train(argv)


@pytest.mark.parametrize(
    ("sizes", "base"), [([2, 1, 1], "world"), ([2, 1, 1], "none"), ([3, 1], "world")]
)
def test_the_run_is_that_of_one_process(
    pools: Pools, command: Any, tmp_path: Path, sizes: list[int], base: str
) -> None:
    pools(1).run(train, command(tmp_path / "one", sharding__base="none"))
    argv = command(tmp_path / "run", sharding__base=base)
    results = pools(4).run(placed, sizes, argv)
    assert all(same_bits(results[0]["tensors"], other["tensors"]) for other in results[1:])
    for ours, theirs in zip(figures(tmp_path / "run"), figures(tmp_path / "one"), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)


def test_a_base_on_each_node_needs_nodes(pools: Pools, command: Any, tmp_path: Path) -> None:
    """Where 1 alone divides all of them, every rank would hold the whole of it."""
    argv = command(tmp_path / "run", sharding__base="node")
    with pytest.raises(RankFailure, match=r"sharding\.base: node .* but one has 2, and others"):
        pools(4).run(placed, [2, 1, 1], argv)


def topology(sizes: list[int]) -> tuple[int, int]:
    """(ranks of a node, this rank's node) in a loop of one's own."""
    on_this_machine = [size for size in sizes for _ in range(size)][int(os.environ["RANK"])]
    os.environ["LOCAL_WORLD_SIZE"] = str(on_this_machine)
    found = Topology.current()
    return found.ranks_per_node, found.node


@pytest.mark.parametrize(
    ("sizes", "wanted"),
    [
        ([2, 1, 1], [(1, 0), (1, 1), (1, 2), (1, 3)]),
        ([2, 2], [(2, 0), (2, 0), (2, 1), (2, 1)]),
    ],
)
def test_every_rank_sees_the_same_nodes(
    pools: Pools, sizes: list[int], wanted: list[tuple[int, int]]
) -> None:
    assert pools(4).run(topology, sizes) == wanted
