"""Whole runs with LoRA-Pro and with bitsandbytes' 8-bit AdamW: one result whatever the ranks and
the engine, checkpoints that go on, and what a run says of its state.
"""

import functools
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from ranks import Pools
from run_training import figures, relative_error, same_bits, train
from safetensors.torch import load_file
from test_divided_runs import crashed
from test_resume import check_equal, steps_saved, told
from test_wire import counted

STEPS, SAVED = 8, 3
PRO = {"optimizer__name": "lora_pro", "adapter__modules_to_save": ["model.norm"]}
# In 8 bits: adapters of which some are large enough for it.
EIGHT = {"adapter__r": 16, "adapter__target_modules": ["q_proj", "k_proj", "down_proj"]}
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "low": PRO | {"optimizer__lr": 1e-3},
    "full": PRO | {"optimizer__lr": 2e-4, "optimizer__lora_pro_moments": "full"},
    "8bit": EIGHT | {"optimizer__name": "adamw8bit", "optimizer__lr": 1e-3},
    "paged": EIGHT | {"optimizer__name": "paged_adamw8bit", "optimizer__lr": 1e-3},
}
# Of loss and gradient norm, and of each tensor. Where rounding takes one of 8-bit AdamW's moments
# over the edge between two codes, that moment changes by some percent.
BOUNDS = {"low": (1e-5, 1e-4), "full": (1e-5, 1e-4), "8bit": (2e-4, 1e-2)}


@pytest.fixture(scope="module")
def command(words: Any) -> Any:
    """command(directory, optimizer, **settings): the words of a run."""

    def of(directory: Path, optimizer: str, **settings: Any) -> list[str]:
        chosen = OPTIMIZERS[optimizer]
        common = {
            "output__save_every": SAVED,
            "train__max_steps": STEPS,
            "adapter__use_rslora": True,
            "optimizer__weight_decay": 0.05,
        }
        model = "wide" if "adapter__r" in chosen else "llama"
        return words(directory, model, **common | chosen | settings)

    return of


@pytest.fixture(scope="module")
def one_process(pools: Pools, command: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A run in one process: (its result, its metrics)."""

    @functools.cache
    def of(optimizer: str, steps: int) -> Any:
        directory = tmp_path_factory.mktemp(optimizer)
        argv = command(directory, optimizer, train__max_steps=steps)
        return pools(1).run(train, argv)[0], figures(directory)

    return of


def check_near(results: list[Any], metrics: list[Any], one: Any, bounds: Any) -> None:
    """Near another run, and the same bits on every rank."""
    (wanted, wanted_metrics), (loss, tensors) = one, bounds
    for result in results:
        assert result["status"] == 0
        assert same_bits(result["tensors"], results[0]["tensors"])
        for name, tensor in wanted["tensors"].items():
            assert relative_error(result["tensors"][name], tensor) < tensors, name
    for got, expected in zip(metrics, wanted_metrics, strict=True):
        assert got["loss"] == pytest.approx(expected["loss"], rel=loss)
        assert got["grad_norm"] == pytest.approx(expected["grad_norm"], rel=loss)


@pytest.mark.parametrize(
    ("optimizer", "world", "per_node", "engine", "base"),
    [  # 10 to 25 s each: by default every optimizer, every engine, every number of ranks
        pytest.param("low", 2, 2, "fsdp2", "world", marks=pytest.mark.full),
        pytest.param("low", 3, 3, "fsdp2", "world", marks=pytest.mark.full),
        ("low", 4, 2, "fsdp2", "node"),
        pytest.param("low", 2, 2, "zero3", "world", marks=pytest.mark.full),
        ("full", 2, 2, "zero3", "world"),
        pytest.param("full", 3, 3, "fsdp2", "world", marks=pytest.mark.full),
        pytest.param("8bit", 2, 2, "zero3", "world", marks=pytest.mark.full),
        ("8bit", 3, 3, "fsdp2", "world"),
    ],
)
def test_a_run_is_the_run_of_one_process(
    pools: Pools,
    command: Any,
    one_process: Any,
    tmp_path: Path,
    optimizer: str,
    world: int,
    per_node: int,
    engine: str,
    base: str,
) -> None:
    steps = STEPS if optimizer == "8bit" else 20
    settings = {"sharding__engine": engine, "sharding__base": base, "train__max_steps": steps}
    argv = command(tmp_path, optimizer, **settings)
    results = pools(world).run(train, argv, ranks_per_node=per_node)
    check_near(results, figures(tmp_path), one_process(optimizer, steps), BOUNDS[optimizer])


# -- checkpoints ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(pools: Pools, command: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The uninterrupted run on 2 ranks: (its results, its metrics)."""

    @functools.cache
    def of(optimizer: str) -> Any:
        directory = tmp_path_factory.mktemp(f"whole-{optimizer}")
        return pools(2).run(train, command(directory, optimizer)), figures(directory)

    return of


@pytest.fixture(scope="module")
def interrupted(pools: Pools, command: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The directory of a run on 2 ranks that crashed past step 3."""

    @functools.cache
    def of(optimizer: str) -> Path:
        directory = tmp_path_factory.mktemp(f"interrupted-{optimizer}")
        assert pools(2).run(crashed, command(directory, optimizer), 5) == ["crashed"] * 2
        assert steps_saved(directory) == ["step-000003"]
        return directory

    return of


@pytest.mark.parametrize("optimizer", ["low", "full", "8bit"])
def test_resumed_bit_for_bit(
    pools: Pools, command: Any, whole: Any, interrupted: Any, tmp_path: Path, optimizer: str
) -> None:
    directory = shutil.copytree(interrupted(optimizer), tmp_path / "run")
    results = pools(2).run(train, command(directory, optimizer))
    wanted, metrics = whole(optimizer)
    check_equal(results[0], figures(directory), (wanted[0], metrics))
    assert same_bits(results[1]["tensors"], wanted[0]["tensors"])


@pytest.mark.parametrize("optimizer", ["low", "full", "8bit"])
def test_another_world_size(
    pools: Pools, command: Any, whole: Any, interrupted: Any, tmp_path: Path, optimizer: str
) -> None:
    """From 2 ranks to 3, on to one process."""
    directory = shutil.copytree(interrupted(optimizer), tmp_path / "run")
    assert pools(3).run(crashed, command(directory, optimizer), 4) == ["crashed"] * 3
    assert steps_saved(directory) == ["step-000003", "step-000006"]
    results = pools(1).run(train, command(directory, optimizer))
    wanted, metrics = whole(optimizer)
    check_near(results, figures(directory), (wanted[0], metrics), BOUNDS[optimizer])


def test_a_spread_state_is_saved_by_all_and_a_replicated_one_by_any(
    pools: Pools, command: Any, whole: Any, tmp_path: Path
) -> None:
    """Both give the same bits: a pair's step is the same whoever makes it."""
    spread, metrics = whole("low")
    assert spread[1]["optimizer"] is None  # rank 0 alone gets a checkpoint
    argv = command(tmp_path, "low", sharding__optimizer_state="replicated")
    results = pools(2).run(train, argv)
    for result in results:
        assert same_bits(result["tensors"], spread[0]["tensors"])
        assert same_bits(result["optimizer"], spread[0]["optimizer"])
    for got, more in zip(figures(tmp_path), metrics, strict=True):
        assert got["wire_bytes"] < more["wire_bytes"]


def test_a_run_says_that_its_saves_are_collective(
    pools: Pools, command: Any, tmp_path: Path
) -> None:
    argv = command(tmp_path, "low", train__max_steps=1)
    printed = pools(2).run(told, argv)[0][1]
    assert "optimizer state: divided, 1/2 on each rank, so a save needs all ranks" in printed
    settings = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert settings["sharding"]["optimizer_state"] == "divided"


def test_a_checkpoint_holds_the_8_bit_state(interrupted: Any) -> None:
    """Codes, scales and maps of tensors from 4096 elements on; float32 moments of the others."""
    where = interrupted("8bit") / "checkpoints" / "step-000003"
    values = load_file(where / "adapter.safetensors")
    states = load_file(where / "optimizer.safetensors")
    large = {name for name, tensor in values.items() if tensor.numel() >= 4096}
    assert large and large != values.keys()
    for name, tensor in values.items():
        slots = {key.removeprefix(f"{name}."): s for key, s in states.items() if name in key}
        assert int(slots.pop("step")) == SAVED
        kinds = {slot: (state.dtype, state.numel()) for slot, state in slots.items()}
        code, blocks = (torch.uint8, tensor.numel()), -(-tensor.numel() // 256)
        if name in large:
            scales, meaning = (torch.float32, blocks), (torch.float32, 256)
            assert kinds == {
                **dict.fromkeys(("state1", "state2"), code),
                **dict.fromkeys(("absmax1", "absmax2"), scales),
                **dict.fromkeys(("qmap1", "qmap2"), meaning),
            }
        else:
            assert kinds == dict.fromkeys(("state1", "state2"), (torch.float32, tensor.numel()))


def test_a_checkpoint_from_before_an_option_goes_on(
    pools: Pools, command: Any, whole: Any, interrupted: Any, tmp_path: Path
) -> None:
    """An option that its config.yaml does not know had its default."""
    directory = shutil.copytree(interrupted("low"), tmp_path / "run")
    checkpoint = directory / "checkpoints" / "step-000003"
    text = (checkpoint / "config.yaml").read_text()
    assert "  lora_pro_moments: low\n" in text
    (checkpoint / "config.yaml").write_text(text.replace("  lora_pro_moments: low\n", ""))
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["files"]["config.yaml"] = entry_of(checkpoint / "config.yaml")
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    results = pools(2).run(train, command(directory, "low"))
    assert same_bits(results[0]["tensors"], whole("low")[0][0]["tensors"])
    changed = command(directory, "full", train__max_steps=STEPS + 1, optimizer__lr=1e-3)
    with pytest.raises(AssertionError, match="lora_pro_moments was 'low' and is 'full'"):
        pools(2).run(train, changed)


def entry_of(path: Path) -> dict[str, Any]:
    content = path.read_bytes()
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


# -- what the plan says ---------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["low", "full", "8bit"])
@pytest.mark.parametrize(
    ("base", "world", "per_node"),
    [
        ("node", 4, 2),
        pytest.param("world", 3, 3, marks=pytest.mark.full),  # 2 to 4 s each: a part of the first
    ],
)
def test_the_plan_is_what_is_sent(
    pools: Pools,
    command: Any,
    tmp_path: Path,
    optimizer: str,
    base: str,
    world: int,
    per_node: int,
) -> None:
    settings = {"output__save_every": 0, "train__max_steps": 2, "train__global_batch_size": world}
    argv = command(tmp_path, optimizer, sharding__base=base, train__micro_batch_size=1, **settings)
    results = pools(world).run(counted, argv, ranks_per_node=per_node)
    audit = 8 * (world - 1)
    recorded = [line["wire_bytes"] for line in figures(tmp_path)]
    for result in results:
        per_step = result["gathers"] + result["reduction"]
        assert recorded == pytest.approx([per_step, per_step + audit], abs=1)
        sent = sum(call.sent() for call in result["calls"])
        assert sent == pytest.approx(2 * per_step + audit, abs=2)


@pytest.mark.parametrize("optimizer", ["low", "full", "8bit"])
def test_the_plan_is_what_is_kept(
    pools: Pools, command: Any, tmp_path: Path, optimizer: str
) -> None:
    """In the closing table, of rank 0."""
    argv = command(tmp_path, optimizer, train__max_steps=2, output__save_every=0)
    printed = pools(3).run(told, argv)[0][1]
    line = next(row for row in printed.splitlines() if row.startswith("A, B, gradients, state"))
    assert float(line.split()[-1]) == pytest.approx(1, abs=0.05)


def test_without_a_gpu_paged_is_adamw8bit_and_says_so(
    pools: Pools, command: Any, whole: Any, tmp_path: Path
) -> None:
    results = pools(2).run(told, command(tmp_path, "paged"))
    assert same_bits(results[0][0]["tensors"], whole("8bit")[0][0]["tensors"])
    said = [line for line in results[0][1].splitlines() if line.startswith("warning: ")]
    assert said == ["warning: optimizer.name: without a GPU paged_adamw8bit works as adamw8bit"]
