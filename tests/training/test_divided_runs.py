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
import torch.distributed as dist
from collectives import CollectiveLog
from ranks import Pools
from run_training import figures, prepared_run, relative_error, same_bits, train
from safetensors.torch import load_file
from test_resume import Crash, after_step, check_equal, crash, steps_saved, terminated, told
from test_wire import counted
from tiny import VOCABULARY
from transformers import AutoModelForCausalLM

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


def check_close(results: list[dict[str, Any]], metrics: list[Any], one: Any) -> None:
    """Within invariant 3's bounds of another run, and the same bits on every rank."""
    wanted, wanted_metrics = one
    for result in results:
        assert result["status"] == 0
        assert same_bits(result["tensors"], results[0]["tensors"])
        for name, tensor in wanted["tensors"].items():
            assert relative_error(result["tensors"][name], tensor) < 1e-4, name
    for got, expected in zip(metrics, wanted_metrics, strict=True):
        assert got["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert got["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5)
        assert (got["lr"], got["batch_hash"]) == (expected["lr"], expected["batch_hash"])


# -- invariant 3 ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def one_process(pools: Pools, command: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """20 steps of a replicated run in one process by an optimizer: (its result, its metrics)."""

    @functools.cache
    def of(optimizer: str) -> Any:
        directory = tmp_path_factory.mktemp(optimizer)
        settings = {"train__max_steps": 20, "optimizer__name": optimizer} | REPLICATED
        return pools(1).run(train, command(directory, **settings))[0], figures(directory)

    return of


@pytest.mark.parametrize(
    ("world", "per_node", "base", "optimizer"),
    [
        # 2 and 4 s: nothing is divided on one rank, and the tests of resuming have two
        pytest.param(1, 1, "none", "adamw", marks=pytest.mark.full),
        pytest.param(2, 2, "world", "adamw", marks=pytest.mark.full),
        (3, 2, "none", "adamw"),
        (4, 2, "node", "adamw"),
        (2, 1, "world", "sgd"),
    ],
)
def test_a_run_is_the_run_of_one_process(
    pools: Pools,
    command: Any,
    one_process: Any,
    tmp_path: Path,
    world: int,
    per_node: int,
    base: str,
    optimizer: str,
) -> None:
    settings = {"train__max_steps": 20, "optimizer__name": optimizer, "sharding__base": base}
    results = pools(world).run(train, command(tmp_path, **settings), ranks_per_node=per_node)
    check_close(results, figures(tmp_path), one_process(optimizer))


# -- checkpoints ----------------------------------------------------------------------------------


def crashed(argv: list[str], number: int) -> str:
    """A run that dies after making `number` steps, past its last checkpoint."""
    try:
        train(argv, after_step(number, crash))
    except Crash:
        return "crashed"
    return "finished"


@pytest.fixture(scope="module")
def whole(pools: Pools, command: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The uninterrupted divided run on 2 ranks: (its result, its metrics)."""
    directory = tmp_path_factory.mktemp("whole")
    results = pools(2).run(train, command(directory))
    assert results[1]["optimizer"] is None  # rank 0 alone gets a checkpoint
    return results[0], figures(directory)


@pytest.fixture(scope="module")
def interrupted(pools: Pools, command: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a divided run on 2 ranks that crashed past step 3."""
    directory = tmp_path_factory.mktemp("interrupted")
    assert pools(2).run(crashed, command(directory), 5) == ["crashed"] * 2
    assert steps_saved(directory) == ["step-000003"]
    return directory


def test_resumed_bit_for_bit(
    pools: Pools, command: Any, whole: Any, interrupted: Path, tmp_path: Path
) -> None:
    directory = shutil.copytree(interrupted, tmp_path / "run")
    main, other = pools(2).run(told, command(directory))
    check_equal(main[0], figures(directory), whole)
    assert same_bits(other[0]["tensors"], whole[0]["tensors"])
    assert "optimizer state: divided, 1/2 on each rank, so a save needs all ranks" in main[1]
    assert "optimizer_state: divided" in (directory / "config.yaml").read_text()


def test_checkpoints_move_between_modes_and_world_sizes(
    pools: Pools, command: Any, whole: Any, interrupted: Path, tmp_path: Path
) -> None:
    """Divided on 2 ranks, then replicated on 3, then divided on 2 × 2."""
    directory = shutil.copytree(interrupted, tmp_path / "run")
    assert pools(3).run(crashed, command(directory, **REPLICATED), 4) == ["crashed"] * 3
    assert steps_saved(directory) == ["step-000003", "step-000006"]
    argv = command(directory, sharding__base="node")
    results = pools(4).run(train, argv, ranks_per_node=2)
    check_close(results, figures(directory), whole)
    for slot, state in whole[0]["optimizer"].items():
        assert relative_error(results[0]["optimizer"][slot], state) < 1e-4, slot


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
    [(1, 1, REPLICATED), (1, 1, DIVIDED), (3, 3, DIVIDED), (4, 2, DIVIDED)],
)
def test_files_are_those_of_a_replicated_run(
    pools: Pools,
    command: Any,
    interrupted: Path,
    tmp_path: Path,
    world: int,
    per_node: int,
    settings: dict[str, str],
) -> None:
    """Byte for byte. Each rank sends rank 0 its part of the moments, and receives none of them."""
    origin = interrupted / "checkpoints" / "step-000003"
    argv = command(tmp_path, output__resume=str(origin), **settings)
    results = pools(world).run(saved_again, argv, ranks_per_node=per_node)
    again = tmp_path / "checkpoints" / "step-000003"
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


def test_sigterm_on_one_rank(pools: Pools, command: Any, whole: Any, tmp_path: Path) -> None:
    """All ranks save together after the step in which they learn of it, and none is left behind."""
    stopped = pools(2).run(terminated, command(tmp_path))
    assert [result["status"] for result in stopped] == [143, 143]
    assert steps_saved(tmp_path) == ["step-000003", "step-000005"]
    main, other = pools(2).run(train, command(tmp_path))
    check_equal(main, figures(tmp_path), whole)
    assert same_bits(other["tensors"], whole[0]["tensors"])


# -- invariant 8 ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("base", "world", "per_node"), [("world", 2, 2), ("none", 3, 2), ("node", 4, 2)]
)
def test_the_plan_is_what_is_sent(
    pools: Pools, command: Any, tmp_path: Path, base: str, world: int, per_node: int
) -> None:
    settings = {"output__save_every": 0, "train__max_steps": 2, "train__global_batch_size": world}
    argv = command(tmp_path, sharding__base=base, train__micro_batch_size=1, **settings)
    results = pools(world).run(counted, argv, ranks_per_node=per_node)
    audit = 8 * (world - 1)
    for result in results:
        per_step = result["gathers"] + result["reduction"]
        assert sum(call.sent() for call in result["calls"]) == 2 * per_step + audit
    recorded = [line["wire_bytes"] for line in figures(tmp_path)]
    assert recorded == [per_step, per_step + audit]


# -- a loop of one's own --------------------------------------------------------------------------


def own_loop(path: str, optimizer_state: str) -> dict[str, Any]:
    rank, world = dist.get_rank(), dist.get_world_size()
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    replica = shard(model, base="world", optimizer_state=optimizer_state)
    torch.manual_seed(0)
    attach(model, LoraConfig(r=4, lora_alpha=8, modules_to_save=["model.norm"]))
    groups = replica.parameter_groups(lr=1e-3, loraplus_lr_ratio=4.0, weight_decay=0.1)
    names = {id(parameter): name for name, parameter in replica.optimized.items()}
    grouped = [([names[id(p)] for p in g["params"]], g["lr"], g["weight_decay"]) for g in groups]
    optimizer = replica.attach_optimizer(torch.optim.AdamW(groups))
    draw = torch.Generator().manual_seed(0)
    for _ in range(4):
        ids = torch.randint(VOCABULARY, (4, 12), generator=draw).chunk(world)[rank]
        model(input_ids=ids, labels=ids).loss.backward()
        replica.reduce_gradients()
        replica.clip(1.0)
        optimizer.step()
        optimizer.zero_grad()
    replica.audit()
    return {"groups": grouped, "values": replica.values.clone()}


def test_a_loop_of_ones_own(pools: Pools, saved_models: Any) -> None:
    """Groups go by the whole tensors (a norm has no decay), and are the same on every rank."""
    wanted, _ = pools(2).run(own_loop, saved_models("llama"), "replicated")
    assert len(wanted["groups"]) == 3
    for got in pools(2).run(own_loop, saved_models("llama"), "divided"):
        assert got["groups"] == wanted["groups"]
        assert relative_error(got["values"], wanted["values"]) < 1e-5
