"""AdaLoRA in whole runs: where W0 lives, ranks, micro-batches and a divided state change no mask.

Every run is compared with that of one process, which holds all of W0 and all of the state.
"""

import functools
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from allocations import ADALORA, FINAL, INITIAL, LAST, MASKS, MODULES, STEPS, budget, watched
from ranks import Pools
from run_training import figures, relative_error, same_bits
from safetensors.torch import load_file
from sampling import full, sampled
from tiny import save_chats

# engine, base, ranks, ranks per node, sequences per micro-batch
SAMPLE = [("zero3", "world", 2, 2, 3), ("fsdp2", "node", 4, 2, 1)]
MATRIX = [
    (engine, base, world, per_node, micro)
    for engine in ("fsdp2", "zero3")
    for base in ("none", "node", "world")
    for world, per_node in ((1, 1), (2, 2), (2, 1), (3, 3), (4, 4), (4, 2))
    for micro in (1, 2, 5)
]
# Masks of every kind: two budgets, all importances, no regulariser, with a mask at every step.
SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "params": {"adapter__budget_unit": "params", "adapter__deltaT": 1},
    "sensitivity": {"adapter__importance": "sensitivity", "adapter__orth_reg_weight": 0.0},
    "magnitude": {"adapter__importance": "magnitude", "adapter__tinit": 20},
    "no final phase": {"adapter__tfinal": 0, "adapter__tinit": 0, "train__max_steps": 20},
}
DIVIDED = {"sharding__optimizer_state": "divided"}
Results = list[dict[str, Any]]


@pytest.fixture(scope="module")
def run(pools: Pools, words: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """run(world, per_node, **settings): results by rank, and the run's directory."""
    data = str(save_chats(tmp_path_factory.mktemp("data") / "chats.jsonl", 40))

    def on(world: int, per_node: int, **settings: Any) -> tuple[Results, Path]:
        directory = tmp_path_factory.mktemp("run")
        argv = words(directory, data__train=data, **ADALORA | settings)
        return pools(world).run(watched, argv, ranks_per_node=per_node), directory

    return on


@pytest.fixture(scope="module")
def reference(run: Any) -> Any:
    """reference(kind): the run of one process with SETTINGS, made once."""
    return functools.cache(lambda kind: run(1, 1, **SETTINGS[kind]))


def ranks_json(directory: Path) -> dict[str, dict[str, int]]:
    return json.loads((directory / "ranks.json").read_text())


def check_agrees(got: tuple[Results, Path], wanted: tuple[Results, Path]) -> None:
    """The same masks, triplet by triplet; values within invariant 3's bounds; ranks alike."""
    (results, directory), ([one], one_directory) = got, wanted
    for result in results:
        assert result["masks"] == one["masks"]
        assert result["nonzero"] == one["nonzero"]
        assert same_bits(result["tensors"], results[0]["tensors"])
    assert ranks_json(directory) == ranks_json(one_directory)
    assert results[0]["tensors"].keys() == one["tensors"].keys()
    for name, tensor in one["tensors"].items():
        mine = results[0]["tensors"][name]
        assert mine.shape == tensor.shape, name
        assert relative_error(mine, tensor) < 1e-4 if tensor.numel() else True, name
    for line, expected in zip(figures(directory), figures(one_directory), strict=True):
        for near in ("loss", "grad_norm", "orth_loss"):
            assert line[near] == pytest.approx(expected[near], rel=1e-5), near
        for exact in ("budget", "kept_ranks", "tokens", "batch_hash"):
            assert line[exact] == expected[exact], exact


# -- one process ----------------------------------------------------------------------------------


def test_the_budget_is_kept_to_through_three_phases(reference: Any) -> None:
    """promise 2.4: no call is needed for a mask, and the metrics say the budget at every step.

    promise 2.8: what is kept is the budget, at every mask.
    """
    [one], directory = reference("default")
    assert list(one["masks"]) == list(MASKS)
    for step, kept in one["masks"].items():
        assert sum(map(len, kept.values())) == one["nonzero"][step] == budget(step), step
    assert ranks_json(directory) == {
        str(step): {module: len(left) for module, left in kept.items()}
        for step, kept in one["masks"].items()
    }
    lines = figures(directory)
    assert [line["budget"] for line in lines] == [budget(t) for t in range(1, STEPS + 1)]
    for line in lines:  # between two masks what the earlier one left
        last_mask = max((t for t in MASKS if t <= line["step"]), default=0)
        assert line["kept_ranks"] == (budget(last_mask) if last_mask else INITIAL)
        assert isinstance(line["kept_ranks"], int) and line["orth_loss"] > 0
    assert (directory / "ranks.png").read_bytes().startswith(b"\x89PNG")
    ranks = [len(left) for left in one["masks"][LAST].values()]
    assert len(ranks) == MODULES and sum(ranks) == FINAL and len(set(ranks)) > 2  # it chose


# -- invariant 3 ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("engine", "base", "world", "per_node", "micro"), sampled(SAMPLE, MATRIX))
def test_placement_changes_no_mask(
    run: Any, reference: Any, engine: str, base: str, world: int, per_node: int, micro: int
) -> None:
    """promise 2.1: AdaLoRA under FSDP2 and HSDP is that of one process.

    promise 2.2: and under ZeRO-3. promise 2.3: every rank has the same masks.
    """
    where = {"sharding__engine": engine, "sharding__base": base, "train__micro_batch_size": micro}
    check_agrees(run(world, per_node, **where), reference("default"))


@pytest.mark.parametrize(
    ("kind", "world", "state"),
    sampled(
        [("no final phase", 3, "divided")],
        itertools.product(SETTINGS, (2, 3), ("replicated", "divided")),
    ),
)
def test_other_settings(run: Any, reference: Any, kind: str, world: int, state: str) -> None:
    settings = SETTINGS[kind] | {"sharding__optimizer_state": state}
    check_agrees(run(world, world, **settings), reference(kind))


# -- a divided optimizer state --------------------------------------------------------------------


@pytest.mark.parametrize(("world", "per_node", "base"), [(2, 2, "world"), full(4, 2, "node")])
def test_a_divided_state(run: Any, reference: Any, world: int, per_node: int, base: str) -> None:
    """Masks, weights and files of a replicated run, of whose averages each rank has 1/N."""
    results, directory = got = run(world, per_node, sharding__base=base, **DIVIDED)
    [one], one_directory = wanted = reference("default")
    check_agrees(got, wanted)
    for step in range(1, STEPS + 1):
        whole = one["averages"][step]
        shares = [result["averages"][step] for result in results]
        assert sum(shares) == whole and (whole > 0) == (step < LAST)
        assert max(shares) <= 4 * 2 * -(-whole // (4 * 2) // world)
    [saved], [one_saved] = (
        list((d / "checkpoints").glob("step-*")) for d in (directory, one_directory)
    )
    for file in ("adapter", "optimizer", "scorer"):
        tensors, expected = (load_file(d / f"{file}.safetensors") for d in (saved, one_saved))
        assert {n: t.shape for n, t in tensors.items()} == {n: t.shape for n, t in expected.items()}
        for name, tensor in expected.items():
            if tensor.numel() and tensor.ndim:
                assert relative_error(tensors[name], tensor) < 1e-4, name
