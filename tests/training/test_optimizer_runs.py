"""Whole runs with LoRA-Pro and with bitsandbytes' 8-bit AdamW: one result whatever the ranks and
the engine, checkpoints that go on, and what a run says of its state.
"""

import functools
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from counted_runs import counted, sent
from hostile import agree
from ranks import Pools
from run_training import Runs, check_near, same_bits, told
from safetensors.torch import load_file
from sampling import full
from stopped_runs import check_equal, crashed, interrupted_run, steps_saved

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
BOUNDS: dict[str, dict[str, float]] = {"low": {}, "full": {}, "8bit": {"rel": 2e-4, "bound": 1e-2}}


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
    """one_process(optimizer, steps): a run in one process."""
    run = Runs(pools, command, tmp_path_factory.mktemp("one"))
    return functools.cache(lambda name, steps: run(name, 1, name, train__max_steps=steps))


@pytest.mark.parametrize(
    ("optimizer", "world", "per_node", "engine", "base"),
    [  # 10 to 25 s each: by default every optimizer, every engine, every number of ranks
        full("low", 2, 2, "fsdp2", "world"),
        full("low", 3, 3, "fsdp2", "world"),
        full("low", 4, 2, "fsdp2", "node"),
        full("low", 2, 2, "zero3", "world"),
        ("full", 2, 2, "zero3", "world"),
        full("full", 3, 3, "fsdp2", "world"),
        full("8bit", 2, 2, "zero3", "world"),
        ("8bit", 3, 3, "fsdp2", "world"),
    ],
)
def test_a_run_is_the_run_of_one_process(
    run: Runs, one_process: Any, optimizer: str, world: int, per_node: int, engine: str, base: str
) -> None:
    steps = STEPS if optimizer == "8bit" else 20
    settings = {"sharding__engine": engine, "sharding__base": base, "train__max_steps": steps}
    got = run("run", world, optimizer, per_node=per_node, **settings)
    check_near(got, one_process(optimizer, steps), **BOUNDS[optimizer])


# -- checkpoints ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(pools: Pools, command: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """whole(optimizer): the uninterrupted run on 2 ranks."""
    run = Runs(pools, command, tmp_path_factory.mktemp("whole"))
    return functools.cache(lambda optimizer: run(optimizer, 2, optimizer))


@pytest.fixture(scope="module")
def interrupted(pools: Pools, command: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The directory of a run on 2 ranks that crashed past step 3."""

    return functools.cache(
        lambda optimizer: interrupted_run(
            Runs(pools, command, tmp_path_factory.mktemp("interrupted")), 5, optimizer
        )
    )


# 4 s each; those of all three kinds are saved and read alike
@pytest.mark.parametrize("optimizer", ["low", full("full"), "8bit"])
def test_resumed_bit_for_bit(run: Runs, whole: Any, interrupted: Any, optimizer: str) -> None:
    shutil.copytree(interrupted(optimizer), run.root / "run")
    check_equal(run("run", 2, optimizer), whole(optimizer))


@pytest.mark.parametrize("optimizer", ["low", full("full"), full("8bit")])
def test_another_world_size(run: Runs, whole: Any, interrupted: Any, optimizer: str) -> None:
    """From 2 ranks to 3, on to one process."""
    directory = shutil.copytree(interrupted(optimizer), run.root / "run")
    stopped, _ = run("run", 3, optimizer, work=crashed, arguments=(4,))
    assert stopped == ["crashed"] * 3
    assert steps_saved(directory) == ["step-000003", "step-000006"]
    check_near(run("run", 1, optimizer), whole(optimizer), **BOUNDS[optimizer])


def test_a_spread_state_is_saved_by_all_and_a_replicated_one_by_any(run: Runs, whole: Any) -> None:
    """Both give the same bits: a pair's step is the same whoever makes it."""
    spread, metrics = whole("low")
    assert spread[1]["optimizer"] is None  # rank 0 alone gets a checkpoint
    results, lines = run("run", 2, "low", sharding__optimizer_state="replicated")
    for result in results:
        assert same_bits(result["tensors"], spread[0]["tensors"])
        assert same_bits(result["optimizer"], spread[0]["optimizer"])
    for got, more in zip(lines, metrics, strict=True):
        assert got["wire_bytes"] < more["wire_bytes"]


def test_a_run_says_that_its_saves_are_collective(run: Runs) -> None:
    [(_, printed), _], _ = run("run", 2, "low", work=told, train__max_steps=1)
    assert "optimizer state: divided, 1/2 on each rank, so a save needs all ranks" in printed
    settings = yaml.safe_load((run.root / "run" / "config.yaml").read_text())
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
    run: Runs, whole: Any, interrupted: Any
) -> None:
    """An option that its config.yaml does not know had its default."""
    directory = shutil.copytree(interrupted("low"), run.root / "run")
    checkpoint = directory / "checkpoints" / "step-000003"
    text = (checkpoint / "config.yaml").read_text()
    assert "  lora_pro_moments: low\n" in text
    (checkpoint / "config.yaml").write_text(text.replace("  lora_pro_moments: low\n", ""))
    agree(checkpoint)
    results, _ = run("run", 2, "low")
    assert same_bits(results[0]["tensors"], whole("low")[0][0]["tensors"])
    with pytest.raises(AssertionError, match="lora_pro_moments was 'low' and is 'full'"):
        run("run", 2, "full", train__max_steps=STEPS + 1, optimizer__lr=1e-3)


# -- what the plan says ---------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["low", full("full"), "8bit"])
@pytest.mark.parametrize(
    ("base", "world", "per_node"),
    [
        ("node", 4, 2),
        full("world", 3, 3),  # 2 to 4 s each: a part of the first
    ],
)
def test_the_plan_is_what_is_sent(
    run: Runs, optimizer: str, base: str, world: int, per_node: int
) -> None:
    settings = {"output__save_every": 0, "train__max_steps": 2, "train__global_batch_size": world}
    settings |= {"sharding__base": base, "train__micro_batch_size": 1}
    results, lines = run("run", world, optimizer, work=counted, per_node=per_node, **settings)
    audit = 8 * (world - 1)
    recorded = [line["wire_bytes"] for line in lines]
    for result in results:
        per_step = result["gathers"] + result["reduction"]
        assert recorded == pytest.approx([per_step, per_step + audit], abs=1)
        assert sent(result) == pytest.approx(2 * per_step + audit, abs=2)


@pytest.mark.parametrize("optimizer", [full("low"), "full", "8bit"])
def test_the_plan_is_what_is_kept(run: Runs, optimizer: str) -> None:
    """In the closing table, of rank 0."""
    settings = {"train__max_steps": 2, "output__save_every": 0}
    [(_, printed), *_], _ = run("run", 3, optimizer, work=told, **settings)
    line = next(row for row in printed.splitlines() if row.startswith("A, B, gradients, state"))
    assert float(line.split()[-1]) == pytest.approx(1, abs=0.05)


def test_without_a_gpu_paged_is_adamw8bit_and_says_so(run: Runs, whole: Any) -> None:
    [(result, printed), _], _ = run("run", 2, "paged", work=told)
    assert same_bits(result["tensors"], whole("8bit")[0][0]["tensors"])
    said = [line for line in printed.splitlines() if line.startswith("warning: ")]
    assert said == ["warning: optimizer.name: without a GPU paged_adamw8bit works as adamw8bit"]
