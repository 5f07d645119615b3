"""Invariant 8 on a real interface: what crosses between two nodes is the reduction of gradients.

The nodes are network namespaces (`benchmarks/network.py`). Bytes are
read from the counters of the interface between them, protocol headers included.
"""

import json
from pathlib import Path
from typing import Any

import pytest
from network import ADDRESSES, INTERFACE, Link, permitted, two_nodes
from programs import start, status
from ranks import Pools
from run_training import command_line, figures, train
from sampling import full
from tiny import save_chats

NODES = 2
STEPS = 5
R = 160  # large for this model: the gradients of A and B have 11 MB, W0 has 11 MB

pytestmark = pytest.mark.skipif(bool(reason := permitted()), reason=str(reason))


@pytest.fixture(scope="module")
def settings(saved_models: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return {
        "model__path": saved_models("wide"),
        "adapter__r": R,
        "data__train": str(save_chats(tmp_path_factory.mktemp("data") / "chats.jsonl", 24)),
        "train__max_steps": STEPS,
    }


@pytest.fixture(scope="module")
def alone(
    pools: Pools, settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    """The metrics of the same run in one process."""
    directory = tmp_path_factory.mktemp("alone")
    pools(1).run(train, command_line(**settings, output__dir=str(directory)))
    return figures(directory)


# 11 s: alone on its node, a rank has no W0 to share
@pytest.mark.parametrize("ranks_per_node", [full(1), 2])
def test_between_nodes_only_gradients_travel(
    settings: dict[str, Any], alone: list[dict[str, Any]], tmp_path: Path, ranks_per_node: int
) -> None:
    """With `base: node`; with `base: world`, W0's gathers come on top. The losses are the same.

    promise 3.1: a second node is not sent W0.
    """
    program, log = ["crossing_bytes", str(tmp_path), json.dumps(settings)], tmp_path / "log"
    world = NODES * ranks_per_node
    where = {"MASTER_ADDR": ADDRESSES[0], "GLOO_SOCKET_IFNAME": INTERFACE}
    with two_nodes(Link(), tmp_path / "logs") as nodes:
        ranks = start(world, program, log, namespaces=nodes.namespaces, **where)
        assert status(ranks) == 0, log.read_text()
    for base in ("node", "world"):
        for rank in range(world):
            found = json.loads((tmp_path / f"rank-{rank}.json").read_text())[base]
            assert 1e7 < found["adapter"] < found["reduced"] < 1.001 * found["adapter"]
            needed = 2 * (NODES - 1) / NODES * found["reduced"]
            if base == "world":
                needed += found["gathers"]  # of a ring over all ranks, one link leaves each node
            assert len(found["steps"]) == STEPS - 1
            for crossed, resent in zip(found["steps"], found["resent"], strict=True):
                assert needed < crossed < 1.05 * needed + resent
                if base == "node":  # W0's smallest group of weights would add 1.2 %
                    assert crossed < 1.01 * needed + resent
            if base == "node":
                assert found["gathers"] > 0 or ranks_per_node == 1  # inside the node it is gathered
            else:
                assert found["gathers"] > found["adapter"]
        metrics = figures(tmp_path / base)
        for got, expected in zip(metrics, alone, strict=True):
            assert got["loss"] == pytest.approx(expected["loss"], rel=1e-5)
            assert got["batch_hash"] == expected["batch_hash"]
