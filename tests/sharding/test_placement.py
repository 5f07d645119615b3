"""Invariants 3 and 4: where W0 lives, the number of ranks and the micro-batches change nothing.

Every run is compared with the run of one process that holds all of W0 and cuts its batches in twos.
"""

from pathlib import Path
from typing import Any

import pytest
from ranks import Pools
from run_training import command_line, figures, relative_error, same_bits, train
from tiny import save_chats

# engine, base, ranks, ranks per node, sequences per micro-batch
SAMPLE = [
    ("fsdp2", "none", 2, 2, 1),
    ("fsdp2", "node", 2, 1, 7),
    ("fsdp2", "world", 3, 3, 2),
    ("fsdp2", "node", 4, 2, 1),
    ("zero3", "world", 3, 3, 1),
    ("zero3", "node", 4, 2, 2),
    ("zero3", "node", 2, 1, 7),
]
MATRIX = [
    (engine, base, world, per_node, micro)
    for engine in ("fsdp2", "zero3")
    for base in ("none", "node", "world")
    for world, per_node in ((1, 1), (2, 2), (2, 1), (3, 3), (3, 1), (4, 4), (4, 2), (4, 1))
    for micro in (1, 2, 7)
]
Run = tuple[list[dict[str, Any]], list[dict[str, Any]]]  # results by rank, lines of the metrics


class Runs:
    """Runs of 20 steps on the same model and data."""

    def __init__(self, pools: Pools, model: str, root: Path) -> None:
        self._pools, self._model, self._root = pools, model, root
        self._data = save_chats(root / "chats.jsonl", 40)
        self._references: dict[str, Run] = {}
        self._count = 0

    def on(self, world: int, per_node: int, **settings: Any) -> Run:
        self._count += 1
        directory = self._root / f"run-{self._count}"
        argv = command_line(
            model__path=self._model,
            data__train=str(self._data),
            output__dir=str(directory),
            **settings,
        )
        results = self._pools(world).run(train, argv, ranks_per_node=per_node)
        return results, figures(directory)

    def reference(self, **settings: Any) -> Run:
        """The run of one process, made once."""
        key = repr(settings)
        if key not in self._references:
            self._references[key] = self.on(1, 1, **settings)
        return self._references[key]


@pytest.fixture(scope="module")
def runs(pools: Pools, saved_models: Any, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(pools, saved_models("llama"), tmp_path_factory.mktemp("runs"))


def check_agrees(run: Run, reference: Run) -> None:
    """Loss and gradient norm to 1e-5, A and B to 1e-4, the same batches, bit-identical ranks."""
    (results, metrics), ([wanted], wanted_metrics) = run, reference
    assert all(same_bits(result["tensors"], results[0]["tensors"]) for result in results)
    assert [line["step"] for line in metrics] == list(range(1, 21))
    for got, expected in zip(metrics, wanted_metrics, strict=True):
        assert got["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert got["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5)
        for exact in ("lr", "tokens", "batch_hash"):
            assert got[exact] == expected[exact]
    assert metrics[-1]["loss"] < 0.95 * metrics[0]["loss"]  # it trained
    for name, tensor in results[0]["tensors"].items():
        assert relative_error(tensor, wanted["tensors"][name]) < 1e-4, name


@pytest.mark.parametrize(
    ("engine", "base", "world", "per_node", "micro"),
    [
        *SAMPLE,
        *(pytest.param(*case, marks=pytest.mark.full) for case in MATRIX if case not in SAMPLE),
    ],
)
def test_placement_changes_nothing(
    runs: Runs, engine: str, base: str, world: int, per_node: int, micro: int
) -> None:
    settings = {
        "sharding__engine": engine,
        "sharding__base": base,
        "train__micro_batch_size": micro,
    }
    check_agrees(runs.on(world, per_node, **settings), runs.reference())


@pytest.mark.parametrize(
    ("engine", "world", "micro"),
    [("zero3", 3, 1), pytest.param("fsdp2", 4, 2, marks=pytest.mark.full)],
)
def test_dropout_masks_belong_to_the_sequences(
    runs: Runs, engine: str, world: int, micro: int
) -> None:
    dropout = {"adapter__lora_dropout": 0.1}
    reference = runs.reference(**dropout)
    settings = {"sharding__engine": engine, "sharding__base": "world"}
    run = runs.on(world, world, train__micro_batch_size=micro, **settings, **dropout)
    check_agrees(run, reference)
    without = runs.reference()[1]
    assert reference[1][-1]["loss"] != pytest.approx(without[-1]["loss"], rel=1e-4)  # it acts


@pytest.mark.parametrize("engine", ["fsdp2", "zero3"])
@pytest.mark.parametrize("dropout", [0.0, pytest.param(0.1, marks=pytest.mark.full)])
def test_activation_checkpointing_changes_nothing(runs: Runs, engine: str, dropout: float) -> None:
    settings = {"adapter__lora_dropout": dropout} if dropout else {}
    where = {"sharding__engine": engine, "sharding__base": "world"}
    run = runs.on(2, 2, sharding__activation_checkpointing=True, **where, **settings)
    check_agrees(run, runs.reference(**settings))


def test_offloaded_partitions_change_nothing(runs: Runs) -> None:
    where = {"sharding__engine": "zero3", "sharding__base": "world", "sharding__cpu_offload": True}
    check_agrees(runs.on(2, 2, **where), runs.reference())


@pytest.mark.parametrize(("name", "world"), [("gpt2", 3), ("tied", 3), ("mixtral", 4)])
@pytest.mark.parametrize("engine", ["fsdp2", "zero3"])
@pytest.mark.full
def test_other_architectures(
    pools: Pools, saved_models: Any, tmp_path: Path, name: str, world: int, engine: str
) -> None:
    runs = Runs(pools, saved_models(name), tmp_path)
    where = {"sharding__engine": engine, "sharding__base": "world"}
    check_agrees(runs.on(world, world, **where), runs.reference())
