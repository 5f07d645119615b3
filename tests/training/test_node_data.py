"""The ranks of a node have the data set that its first rank alone has encoded."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
from ranks import Pools
from refusals import preparation, refusal
from tiny import save_chats

from dlora.config.load import parse
from dlora.data.encode import Encoder
from dlora.errors import TransientError, UsageError
from dlora.runtime.ranks import Ranks
from dlora.sharding.topology import Topology
from dlora.training import material
from dlora.training.node_data import NodeData
from dlora.training.prepare import Preparation
from dlora.training.startup import prepared

TRAINED, HELD_OUT = 24, 7  # records
Found = tuple[Any, int]  # what was prepared, or why not; texts that were encoded here


def contents(found: Preparation) -> list[Any]:
    """All that there is of the data, in a form that can be compared."""
    sets = [found.train, found.eval]
    arrays = [[array.tolist() for array in one.arrays] for one in sets]  # type: ignore[union-attr]
    told = [[one.fingerprint, one.report, one.weights] for one in sets]  # type: ignore[union-attr]
    return [arrays, told]


def prepared_here(argv: list[str], broken: int | None = None) -> Found:
    """One rank of a run that is prepared; `broken` meets an error of its own before the data."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    these = Ranks(rank, world, torch.device("cpu"), ranks.current_store)
    seen = [0]

    def encode(encoder: Any, texts: Any, whole: Any = Encoder.encode) -> Any:
        seen[0] += len(texts)
        return whole(encoder, texts)

    def identity(*_: Any) -> None:
        raise UsageError("the disk of this rank is gone")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Encoder, "encode", encode)
        if rank == broken:
            patch.setattr(material, "identity", identity)
        try:
            found: Any = contents(prepared(parse(argv, "dlora.train").config, these))
        except UsageError as error:
            found = str(error)
    return found, seen[0]


@pytest.fixture
def argv(words: Any, tmp_path: Path) -> list[str]:
    """Entries of two weights, and other data to evaluate on."""
    entries = [
        {"path": str(save_chats(tmp_path / "a.jsonl", TRAINED - 8)), "weight": 2.0},
        {"path": str(save_chats(tmp_path / "b.jsonl", 8)), "weight": 1.0},
    ]
    held_out = str(save_chats(tmp_path / "held_out.jsonl", HELD_OUT))
    return words(tmp_path / "run", data__train=entries, data__eval=held_out)


@pytest.mark.parametrize("is_cached", [False, True], ids=["not cached", "cached"])
def test_one_rank_of_a_node_encodes(
    pools: Pools, argv: list[str], tmp_path: Path, is_cached: bool
) -> None:
    """Two nodes of two ranks; with a cache that both see one of them does."""
    wanted = contents(preparation(argv))
    if is_cached:
        argv = [*argv, "--data.cache_dir", str(tmp_path / "cache")]
    found = pools(4).run(prepared_here, argv, ranks_per_node=2)
    assert [told for told, _ in found] == [wanted] * 4
    counts, once = [count for _, count in found], TRAINED + HELD_OUT
    assert counts[1::2] == [0, 0]
    assert sum(counts) == once if is_cached else counts[::2] == [once, once]


def test_a_record_s_error_is_that_of_all(pools: Pools, argv: list[str], tmp_path: Path) -> None:
    """By file and line, as one process says it."""
    lines = (tmp_path / "b.jsonl").read_text().splitlines()
    lines[2] = json.dumps({"messages": [{"role": "user", "content": "Hi"}]})
    (tmp_path / "b.jsonl").write_text("\n".join(lines) + "\n")
    wanted = refusal(preparation, argv)
    assert "b.jsonl:3: " in wanted
    found = pools(4).run(prepared_here, argv, ranks_per_node=4)
    assert [said for said, _ in found] == [wanted] * 4
    assert [count for _, count in found][1:] == [0] * 3


@pytest.mark.parametrize("broken", [0, 1, 3])
def test_a_rank_that_fails_alone_is_not_waited_for(
    pools: Pools, argv: list[str], broken: int
) -> None:
    found = pools(4).run(prepared_here, argv, broken, ranks_per_node=4)
    said = "the disk of this rank is gone"
    assert [told for told, _ in found] == [f"rank {broken}: {said}" if broken else said] * 4


def test_a_first_rank_that_never_comes_is_named() -> None:
    """It hangs, say, and raises nothing."""
    store = torch.distributed.HashStore()
    these = Ranks(1, 2, torch.device("cpu"), store)
    data = NodeData(these, Topology.over(1, [2, 2], None), limit_seconds=0.1)
    with pytest.raises(
        TransientError, match=r"^rank 0 on .* has not got so far with the data in 0.1"
    ):
        data.once("data.train", lambda: pytest.fail("it is the first rank's to encode"))
