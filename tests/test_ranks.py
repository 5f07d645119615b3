"""The harness itself: failures are told, no process is left, and the next call works."""

import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import Pool, Pools, RankFailure


def where(extra: Any) -> tuple[Any, ...]:
    total = torch.ones(1)
    if dist.is_initialized():
        dist.all_reduce(total)
    names = ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
    return (*(int(os.environ[name]) for name in names), int(total), os.getpid(), extra)


@pytest.mark.parametrize(("world", "per_node"), [(1, None), (2, None), (3, 1), (4, 2)])
def test_every_rank_runs_the_function(pools: Pools, world: int, per_node: int | None) -> None:
    first = pools(world).run(where, {"a": torch.ones(2)}, ranks_per_node=per_node)
    again = pools(world).run(where, None, ranks_per_node=per_node)
    assert [r[:4] for r in first] == [(k, world, per_node or world, world) for k in range(world)]
    assert [r[4] for r in first] == [r[4] for r in again]  # the same processes
    assert all(torch.equal(r[5]["a"], torch.ones(2)) for r in first)


def fail(how: str) -> None:
    print(f"rank {dist.get_rank()} was here")
    if dist.get_rank() == 1:
        if how == "raise":
            raise ValueError("wrong on purpose")
        if how == "die":
            os._exit(7)
        time.sleep(60)
    dist.barrier()


@pytest.mark.parametrize(
    ("how", "limit", "told"),
    [
        ("raise", 60, ["rank 0: was ended", "ValueError: wrong on purpose"]),
        ("die", 60, ["rank 1: ended with status 7"]),
        ("hang", 1, ["rank 0: no answer within 1 s", "in fail", "in barrier"]),
    ],
)
def test_a_failure_is_told_and_the_pool_replaced(
    tmp_path: Path, how: str, limit: float, told: list[str]
) -> None:
    pool = Pool(2, tmp_path)
    pids = [result[4] for result in pool.run(where, None)]
    with pytest.raises(RankFailure) as failure:
        pool.run(fail, how, limit=limit)
    for line in [*told, "rank 0 was here", "rank 1 was here"]:
        assert line in str(failure.value)
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
    assert [result[3] for result in pool.run(where, None)] == [2, 2]
    pool.close()
