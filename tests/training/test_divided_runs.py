"""Whole runs with `sharding.optimizer_state: divided`: the results, the checkpoint files and the
endings of a replicated run.
"""

import functools
import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from collectives import CollectiveLog
from counted_runs import counted, sent
from own_loops import batches, steps
from ranks import Pools
from run_training import Run, Runs, check_near, prepared_run, relative_error, told
from safetensors.torch import load_file
from sampling import full
from stopped_runs import check_equal, crashed, interrupted_run, steps_saved, terminated
from tiny import whole

from dlora import LoraConfig, attach, shard

STEPS, SAVED = 8, 3
DIVIDED = {"sharding__optimizer_state": "divided"}
REPLICATED = {"sharding__optimizer_state": "replicated"}


@pytest.fixture(scope="module")
def command(words: Any) -> Any:
    """command(directory, **settings): the words of a run with decay, LoRA+ and a trained norm."""
    return functools.partial(
        words,
        output__save_every=SAVED,
        train__max_steps=STEPS,
        adapter__modules_to_save=["model.norm"],
        optimizer__weight_decay=0.05,
        optimizer__loraplus_lr_ratio=2.0,
        optimizer__lr=1e-3,
        **DIVIDED,
    )


# -- invariant 3 ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def one_process(pools: Pools, command: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """20 steps of a replicated run in one process by an optimizer."""
    run = Runs(pools, command, tmp_path_factory.mktemp("one"))
    settings = REPLICATED | {"train__max_steps": 20}
    return functools.cache(lambda name: run(name, 1, optimizer__name=name, **settings))


@pytest.mark.parametrize(
    ("world", "per_node", "base", "optimizer"),
    [
        # 2 and 4 s: nothing is divided on one rank, and the tests of resuming have two
        full(1, 1, "none", "adamw"),
        full(2, 2, "world", "adamw"),
        full(3, 2, "none", "adamw"),  # 5 s
        (4, 2, "node", "adamw"),
        (2, 1, "world", "sgd"),
    ],
)
def test_a_run_is_the_run_of_one_process(
    run: Runs, one_process: Any, world: int, per_node: int, base: str, optimizer: str
) -> None:
    settings = {"train__max_steps": 20, "optimizer__name": optimizer, "sharding__base": base}
    check_near(run("run", world, per_node=per_node, **settings), one_process(optimizer))


# -- checkpoints ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def undisturbed(pools: Pools, command: Any, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The divided run on 2 ranks."""
    results, lines = Runs(pools, command, tmp_path_factory.mktemp("whole"))("run", 2)
    assert results[1]["optimizer"] is None  # rank 0 alone gets a checkpoint
    return results, lines


@pytest.fixture(scope="module")
def interrupted(pools: Pools, command: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a divided run on 2 ranks that crashed past step 3."""
    return interrupted_run(Runs(pools, command, tmp_path_factory.mktemp("interrupted")), 5)


def test_resumed_bit_for_bit(
    run: Runs, undisturbed: Run, interrupted: Path, tmp_path: Path
) -> None:
    directory = shutil.copytree(interrupted, tmp_path / "run")
    results, lines = run("run", 2, work=told)
    check_equal(([result for result, _ in results], lines), undisturbed)
    said = "optimizer state: divided, 1/2 on each rank, so a save needs all ranks"
    assert said in results[0][1]
    assert "optimizer_state: divided" in (directory / "config.yaml").read_text()


def test_checkpoints_move_between_modes_and_world_sizes(
    run: Runs, undisturbed: Run, interrupted: Path, tmp_path: Path
) -> None:
    """Divided on 2 ranks, then replicated on 3, then divided on 2 × 2."""
    directory = shutil.copytree(interrupted, tmp_path / "run")
    stopped, _ = run("run", 3, work=crashed, arguments=(4,), **REPLICATED)
    assert stopped == ["crashed"] * 3
    assert steps_saved(directory) == ["step-000003", "step-000006"]
    again = run("run", 4, per_node=2, sharding__base="node")
    check_near(again, undisturbed)
    for slot, state in undisturbed[0][0]["optimizer"].items():
        assert relative_error(again[0][0]["optimizer"][slot], state) < 1e-4, slot


def saved_again(argv: list[str]) -> dict[str, Any]:
    """Resume, and save at once; what was sent and received meanwhile, and the moments here."""
    run = prepared_run(argv)
    with CollectiveLog() as log:
        run.checkpoints.save(run.start, {})
        run.checkpoints.settle()
    states = run.optimizer.state.items()
    moments = [value for _, state in states for value in state.values() if value.ndim]
    return {
        "bytes": sum((Counter({c.op: c.nbytes}) for c in log.calls), Counter()),
        "moments": sum(value.untyped_storage().nbytes() for value in moments),
        "trained": 4 * run.replica.numel,
        "planned": run.prepared.budget.memory.replica,
    }


@pytest.mark.parametrize(
    ("world", "per_node", "settings"),
    [(1, 1, REPLICATED), full(1, 1, DIVIDED), (3, 3, DIVIDED), full(4, 2, DIVIDED)],
)
def test_files_are_those_of_a_replicated_run(
    run: Runs, interrupted: Path, world: int, per_node: int, settings: dict[str, str]
) -> None:
    """Byte for byte. Each rank sends rank 0 its part of the moments, and receives none of them."""
    origin = interrupted / "checkpoints" / "step-000003"
    settings = settings | {"output__resume": str(origin)}
    results, _ = run("run", world, work=saved_again, per_node=per_node, **settings)
    again = run.root / "run" / "checkpoints" / "step-000003"
    for file in ("adapter.safetensors", "optimizer.safetensors"):
        assert (again / file).read_bytes() == (origin / file).read_bytes()
    states = [json.loads((where / "state.json").read_text()) for where in (again, origin)]
    assert [state.pop("ranks") for state in states] == [world, 2]
    assert states[0] == states[1]
    values, states = (load_file(again / f"{n}.safetensors") for n in ("adapter", "optimizer"))
    assert states.keys() == {f"{n}.{s}" for n in values for s in ("exp_avg", "exp_avg_sq", "step")}
    assert all(states[f"{n}.exp_avg"].shape == tensor.shape for n, tensor in values.items())
    first, *others = results
    part = -(-first["trained"] // 4 // world) * 4
    # Values, gradients with their tail, and two moments.
    assert first["planned"] == pytest.approx(2 * first["trained"] + 2 * part, rel=5e-3)
    assert sum(result["moments"] for result in results) == 2 * first["trained"]
    assert all(result["moments"] <= 2 * part for result in results)
    assert first["bytes"]["recv_"] == sum(result["moments"] for result in others)
    for result in others:
        assert result["bytes"].keys() == {"_allgather_base_", "send"}  # what there is, and the part
        assert result["bytes"]["send"] == result["moments"]


def test_sigterm_on_one_rank(run: Runs, undisturbed: Run) -> None:
    """All ranks save together after the step in which they learn of it, and none is left behind."""
    stopped, _ = run("run", 2, work=terminated)
    assert [result["status"] for result in stopped] == [143, 143]
    assert steps_saved(run.root / "run") == ["step-000003", "step-000005"]
    check_equal(run("run", 2), undisturbed)


# -- invariant 8 ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("base", "world", "per_node"), [full("world", 2, 2), full("none", 3, 2), ("node", 4, 2)]
)
def test_the_plan_is_what_is_sent(run: Runs, base: str, world: int, per_node: int) -> None:
    settings = {"output__save_every": 0, "train__max_steps": 2, "train__global_batch_size": world}
    settings |= {"sharding__base": base, "train__micro_batch_size": 1}
    results, lines = run("run", world, work=counted, per_node=per_node, **settings)
    audit = 8 * (world - 1)
    for result in results:
        per_step = result["gathers"] + result["reduction"]
        assert sent(result) == 2 * per_step + audit
    assert [line["wire_bytes"] for line in lines] == [per_step, per_step + audit]


# -- a loop of one's own --------------------------------------------------------------------------


def own_loop(path: str, optimizer_state: str) -> dict[str, Any]:
    model = whole(path)
    replica = shard(model, base="world", optimizer_state=optimizer_state)
    torch.manual_seed(0)
    attach(model, LoraConfig(r=4, lora_alpha=8, modules_to_save=["model.norm"]))
    groups = replica.parameter_groups(lr=1e-3, loraplus_lr_ratio=4.0, weight_decay=0.1)
    names = {id(parameter): name for name, parameter in replica.optimized.items()}
    grouped = [([names[id(p)] for p in g["params"]], g["lr"], g["weight_decay"]) for g in groups]
    optimizer = replica.attach_optimizer(torch.optim.AdamW(groups))
    steps(replica, optimizer, (model(input_ids=ids, labels=ids).loss for ids in batches(4)))
    return {"groups": grouped, "values": replica.values.clone()}


def test_a_loop_of_ones_own(pools: Pools, saved_models: Any) -> None:
    """Groups go by the whole tensors (a norm has no decay), and are the same on every rank."""
    wanted, _ = pools(2).run(own_loop, saved_models("llama"), "replicated")
    assert len(wanted["groups"]) == 3
    for got in pools(2).run(own_loop, saved_models("llama"), "divided"):
        assert got["groups"] == wanted["groups"]
        assert relative_error(got["values"], wanted["values"]) < 1e-5
