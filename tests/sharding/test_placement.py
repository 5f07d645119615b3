"""Invariants 3 and 4: where W0 lives, the number of ranks and the micro-batches change nothing.

Every run is compared with the run of one process that holds all of W0 and cuts its batches in twos.
"""

import functools
import itertools
from pathlib import Path
from typing import Any

import pytest
from ranks import Pools
from run_training import Run, Runs, check_near
from sampling import full, sampled
from tiny import save_chats

# engine, base, ranks, ranks per node, sequences per micro-batch
SAMPLE = [
    ("fsdp2", "none", 2, 2, 1),
    ("fsdp2", "world", 3, 3, 2),
    ("fsdp2", "node", 4, 2, 1),
    ("zero3", "world", 3, 3, 1),
    ("zero3", "node", 4, 2, 2),
]
MATRIX = [
    (engine, base, world, per_node, micro)
    for engine in ("fsdp2", "zero3")
    for base in ("none", "node", "world")
    for world, per_node in ((1, 1), (2, 2), (2, 1), (3, 3), (3, 1), (4, 4), (4, 2), (4, 1))
    for micro in (1, 2, 7)
]


class Compared:
    """Runs of 20 steps on the same model and data; each is compared with that of one process."""

    def __init__(self, pools: Pools, words: Any, root: Path, model: str) -> None:
        self._data = str(save_chats(root / "chats.jsonl", 40))
        self._run = functools.partial(Runs(pools, words, root), model=model, data__train=self._data)
        self._numbers = itertools.count()
        self._references: dict[str, Run] = {}

    def reference(self, **settings: Any) -> Run:
        """The run of one process, made once."""
        key = repr(settings)
        if key not in self._references:
            self._references[key] = self._run(f"run-{next(self._numbers)}", 1, **settings)
        return self._references[key]

    def check(self, world: int, per_node: int, same: dict[str, Any], **where: Any) -> None:
        """A run with settings that change its numbers, and settings that must not."""
        name = f"run-{next(self._numbers)}"
        run = self._run(name, world, per_node=per_node, **same, **where)
        check_near(run, self.reference(**same))
        assert [line["step"] for line in run[1]] == list(range(1, 21))
        assert run[1][-1]["loss"] < 0.95 * run[1][0]["loss"]  # it trained


@pytest.fixture(scope="module")
def runs(pools: Pools, words: Any, tmp_path_factory: pytest.TempPathFactory) -> Compared:
    return Compared(pools, words, tmp_path_factory.mktemp("runs"), "llama")


@pytest.mark.parametrize(("engine", "base", "world", "per_node", "micro"), sampled(SAMPLE, MATRIX))
def test_placement_changes_nothing(
    runs: Compared, engine: str, base: str, world: int, per_node: int, micro: int
) -> None:
    where = {"sharding__engine": engine, "sharding__base": base, "train__micro_batch_size": micro}
    runs.check(world, per_node, {}, **where)


@pytest.mark.parametrize(("engine", "world", "micro"), [("zero3", 3, 1), full("fsdp2", 4, 2)])
def test_dropout_masks_belong_to_the_sequences(
    runs: Compared, engine: str, world: int, micro: int
) -> None:
    dropout = {"adapter__lora_dropout": 0.1}
    where = {"sharding__engine": engine, "train__micro_batch_size": micro}
    runs.check(world, world, dropout, **where, sharding__base="world")
    losses = [runs.reference(**settings)[1][-1]["loss"] for settings in (dropout, {})]
    assert losses[0] != pytest.approx(losses[1], rel=1e-4)  # it acts


# 4 s; `test_zero3.py` recomputes under both engines
@pytest.mark.parametrize("engine", [full("fsdp2"), "zero3"])
@pytest.mark.parametrize("dropout", [0.0, full(0.1)])
def test_activation_checkpointing_changes_nothing(
    runs: Compared, engine: str, dropout: float
) -> None:
    same = {"adapter__lora_dropout": dropout} if dropout else {}
    where = {"sharding__engine": engine, "sharding__base": "world"}
    runs.check(2, 2, same, **where, sharding__activation_checkpointing=True)


@pytest.mark.parametrize("engine", ["fsdp2", "zero3"])
def test_recomputing_each_second_block_changes_nothing(runs: Compared, engine: str) -> None:
    where = {"sharding__engine": engine, "sharding__base": "world"}
    runs.check(2, 2, {}, **where, sharding__activation_checkpointing={"every": 2})


def test_offloaded_partitions_change_nothing(runs: Compared) -> None:
    where = {"sharding__engine": "zero3", "sharding__base": "world", "sharding__cpu_offload": True}
    runs.check(2, 2, {}, **where)


@pytest.mark.parametrize(("name", "world"), [("gpt2", 3), ("tied", 3), ("mixtral", 4)])
@pytest.mark.parametrize("engine", ["fsdp2", "zero3"])
@pytest.mark.full
def test_other_architectures(
    pools: Pools, words: Any, tmp_path: Path, name: str, world: int, engine: str
) -> None:
    where = {"sharding__engine": engine, "sharding__base": "world"}
    Compared(pools, words, tmp_path, name).check(world, world, {}, **where)
