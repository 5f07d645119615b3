"""AdaLoRA in whole runs: the masks and the adapter of one process, wherever W0 and the state are.

promise 2.1: it runs under FSDP2, and equals a single process
promise 2.2: and under ZeRO-3, with no collective for its regulariser
promise 2.3: the same mask on every rank, under any accumulation
promise 2.4: scoring and masking come by themselves
promise 2.7: a resume keeps the averages, also on another world size
promise 2.8: the kept ranks are the budget, always
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from collectives import CollectiveLog
from ranks import Pools
from run_training import command_line, figures, prepared_run, relative_error, same_bits, train
from safetensors.torch import load_file
from test_resume import Crash, crash, steps_saved
from tiny import save_chats

from dlora.lora.budget import BudgetSchedule
from dlora.sharding.wire import ring_reduce_bytes

STEPS, INIT, FINAL = 60, 4, 2
PHASES = {"adapter__tinit": 10, "adapter__tfinal": 15, "adapter__deltaT": 3}
LAST = STEPS - 15


@pytest.fixture(scope="module")
def command(saved_models: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """command(directory, **settings): the words of a run of AdaLoRA through all three phases."""
    data = save_chats(tmp_path_factory.mktemp("data") / "chats.jsonl", 40)

    def of(directory: Path, **settings: Any) -> list[str]:
        common = {
            "model__path": saved_models("llama"),
            "data__train": str(data),
            "output__dir": str(directory),
            "adapter__method": "adalora",
            "adapter__r": None,
            "adapter__init_r": INIT,
            "adapter__target_r": FINAL,
            "train__max_steps": STEPS,
        }
        return command_line(**common | PHASES | settings)

    return of


def masks(directory: Path) -> dict[int, dict[str, int]]:
    found = json.loads((directory / "ranks.json").read_text())
    return {int(step): ranks for step, ranks in found.items()}


@pytest.fixture(scope="module")
def one(pools: Pools, command: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The run of one process: (its result, its metrics, its masks)."""
    directory = tmp_path_factory.mktemp("one")
    result = pools(1).run(train, command(directory, sharding__base="none"))[0]
    return result, figures(directory), masks(directory)


def check_same(results: list[Any], directory: Path, one: Any) -> None:
    """The masks exactly, the adapter within invariant 3's bounds, the same bits on every rank."""
    wanted, wanted_metrics, wanted_masks = one
    assert masks(directory) == wanted_masks
    for result in results:
        assert result["status"] == 0
        assert same_bits(result["tensors"], results[0]["tensors"])
        assert result["tensors"].keys() == wanted["tensors"].keys()
        for name, tensor in wanted["tensors"].items():
            if tensor.numel():
                assert relative_error(result["tensors"][name], tensor) < 1e-3, name
    for got, expected in zip(figures(directory), wanted_metrics, strict=True):
        assert got["loss"] == pytest.approx(expected["loss"], rel=1e-4)
        assert got["orth_loss"] == pytest.approx(expected["orth_loss"], rel=1e-4)
        assert (got["budget"], got["kept_ranks"]) == (expected["budget"], expected["kept_ranks"])


def test_the_kept_ranks_are_the_budget_after_every_mask(one: Any) -> None:
    _, metrics, found = one
    modules = len(found[LAST])
    schedule = BudgetSchedule(INIT * modules, FINAL * modules, STEPS, 10, 15, 3)
    assert list(found) == [t for t in range(1, STEPS + 1) if schedule.masks(t)]
    for step, ranks in found.items():
        assert sum(ranks.values()) == schedule.budget(step)
    for line in metrics:
        assert line["budget"] == schedule.budget(line["step"])
        if line["step"] in found or line["step"] >= LAST:
            assert line["kept_ranks"] == line["budget"]
    assert len(set(found[LAST].values())) > 1  # the budget went where it was worth something


def test_what_was_pruned_is_gone(one: Any) -> None:
    result, _, found = one
    for name, tensor in result["tensors"].items():
        path, _, factor = name.rpartition(".adapter.")
        assert tensor.shape[{"lora_A": 0, "lora_B": 1, "lora_E": 0}[factor]] == found[LAST][path]


@pytest.mark.parametrize(
    ("engine", "base", "world", "per_node", "micro", "state"),
    [
        ("fsdp2", "none", 2, 2, 1, "replicated"),
        ("fsdp2", "world", 2, 2, 7, "replicated"),
        ("fsdp2", "world", 3, 3, 2, "divided"),
        ("fsdp2", "node", 4, 2, 1, "replicated"),
        ("zero3", "world", 2, 2, 2, "divided"),
        ("zero3", "world", 4, 4, 1, "replicated"),
    ],
)
def test_masks_and_adapter_are_those_of_one_process(
    pools: Pools,
    command: Any,
    one: Any,
    tmp_path: Path,
    engine: str,
    base: str,
    world: int,
    per_node: int,
    micro: int,
    state: str,
) -> None:
    settings = {
        "sharding__engine": engine,
        "sharding__base": base,
        "sharding__optimizer_state": state,
        "train__micro_batch_size": micro,
    }
    results = pools(world).run(train, command(tmp_path, **settings), ranks_per_node=per_node)
    check_same(results, tmp_path, one)


# -- resume ---------------------------------------------------------------------------------------


def crashed(argv: list[str], number: int) -> str:
    """A run that dies after making `number` steps."""
    made = iter(range(1, STEPS + 1))

    def meddle(run: Any) -> None:
        run.optimizer.register_step_post_hook(lambda *_: crash() if next(made) == number else None)

    try:
        train(argv, meddle)
    except Crash:
        return "crashed"
    return "finished"


@pytest.fixture(scope="module")
def whole(pools: Pools, command: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The uninterrupted run on 2 ranks."""
    directory = tmp_path_factory.mktemp("whole")
    result = pools(2).run(train, command(directory))[0]
    return result, figures(directory), masks(directory)


@pytest.mark.parametrize(
    "saved", [7, 20, LAST, 52]
)  # before masks, between two, at the last, after
def test_a_resumed_run_is_the_uninterrupted_one(
    pools: Pools, command: Any, whole: Any, tmp_path: Path, saved: int
) -> None:
    argv = command(tmp_path, output__save_every=saved)
    assert pools(2).run(crashed, argv, min(saved + 3, STEPS)) == ["crashed"] * 2
    assert steps_saved(tmp_path) == [f"step-{saved:06d}"]
    result = pools(2).run(train, argv)[0]
    wanted, metrics, wanted_masks = whole
    assert same_bits(result["tensors"], wanted["tensors"])
    assert same_bits(result["optimizer"], wanted["optimizer"])
    assert masks(tmp_path) == wanted_masks
    assert figures(tmp_path) == metrics


@pytest.mark.parametrize(
    ("world", "engine", "state"), [(3, "fsdp2", "divided"), (1, "fsdp2", "replicated")]
)
@pytest.mark.parametrize("saved", [20, 52])
def test_a_resume_elsewhere_gives_the_same_masks(
    pools: Pools,
    command: Any,
    one: Any,
    tmp_path: Path,
    world: int,
    engine: str,
    state: str,
    saved: int,
) -> None:
    argv = command(tmp_path, output__save_every=saved)
    assert pools(2).run(crashed, argv, saved + 3) == ["crashed"] * 2
    elsewhere = {"sharding__engine": engine, "sharding__optimizer_state": state}
    results = pools(world).run(train, command(tmp_path, output__save_every=0, **elsewhere))
    check_same(results, tmp_path, one)


def test_a_checkpoint_says_which_triplets_are_left(
    pools: Pools, command: Any, one: Any, tmp_path: Path
) -> None:
    pools(2).run(train, command(tmp_path, output__save_every=20, output__keep_last=9))
    kept = {}
    for step in (20, STEPS):
        folder = tmp_path / "checkpoints" / f"step-{step:06d}"
        record = json.loads((folder / "manifest.json").read_text())["triplets"]
        kept[step], tensors = record["kept"], load_file(folder / "adapter.safetensors")
        averages = load_file(folder / "scorer.safetensors")
        assert record["shrunk"] == (step == STEPS)
        if step == STEPS:
            assert not averages
            continue
        assert {name.rpartition(".")[2] for name in averages} == {"exp_avg_ipt", "exp_avg_unc"}
        for key, average in averages.items():
            assert average.shape == tensors[key.rpartition(".")[0]].shape
    assert {path: len(left) for path, left in kept[STEPS].items()} == one[2][LAST]
    assert {path: len(left) for path, left in kept[20].items()} == one[2][18]


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"train__max_steps": STEPS + 1}, "train.max_steps"),
        ({"adapter__target_r": 3}, "adapter.target_r"),
        ({"adapter__deltaT": 5}, "adapter.deltaT"),
        ({"adapter__method": "lora", "adapter__init_r": None}, "adapter.method"),
    ],
)
def test_another_schedule_is_no_continuation(
    pools: Pools, command: Any, tmp_path: Path, settings: dict[str, Any], key: str
) -> None:
    few = {"train__max_steps": STEPS, "output__save_every": 3}
    assert pools(1).run(crashed, command(tmp_path, **few), 4) == ["crashed"]
    if settings.get("adapter__method") == "lora":
        nothing = dict.fromkeys([*PHASES, "adapter__target_r"])
        settings = nothing | settings | {"adapter__r": 4}
    told = pools(1).run(refused, command(tmp_path, **few | settings))[0]
    assert key in told and "another run" in told


def refused(argv: list[str]) -> str:
    try:
        train(argv)
    except (Exception, SystemExit) as error:
        return str(error)
    return "nothing"


# -- the wire -------------------------------------------------------------------------------------


def logged(argv: list[str]) -> Any:
    """Collectives of the steps of a run, and the number of its triplets at the start."""
    run = prepared_run(argv)
    allocator = run.replica.allocator
    assert allocator is not None
    triplets = sum(allocator.ranks.values())
    with CollectiveLog() as log:
        run.train()
    return log.calls, triplets


def test_a_mask_costs_one_small_sum_and_nothing_else_is_sent(
    pools: Pools, command: Any, tmp_path: Path
) -> None:
    """Against the same run with LoRA: of a mask, 4 bytes a triplet between 2 ranks."""
    with_masks, plain = tmp_path / "adalora", tmp_path / "lora"
    calls, triplets = pools(2).run(logged, command(with_masks))[0]
    lines = figures(with_masks)
    settings = dict.fromkeys([*PHASES, "adapter__init_r", "adapter__target_r"])
    pools(2).run(train, command(plain, adapter__method="lora", adapter__r=INIT, **settings))
    singular, presence = 4 * triplets, 4 * len(masks(with_masks)[LAST])
    for line, lora in zip(lines, figures(plain), strict=True):
        extra = line["wire_bytes"] - lora["wire_bytes"]
        if line["step"] in masks(with_masks):
            extra -= ring_reduce_bytes(4 * triplets, 2)
        if 3 < line["step"] <= LAST:  # E and its presence are reduced as A and B are
            assert extra == pytest.approx(ring_reduce_bytes(singular + presence, 2), abs=8)
        elif line["step"] > LAST:
            assert extra < 0
    sums = [call for call in calls if call.op == "allreduce_" and call.nbytes == 4 * triplets]
    assert len(sums) == len(masks(with_masks))


def kept_bytes(argv: list[str]) -> tuple[int, int]:
    """Bytes of a rank's averages, and elements of A, B and E."""
    allocator = (run := prepared_run(argv)).replica.allocator
    assert allocator is not None
    nbytes = sum(a.nbytes for slots in allocator.averages().values() for a in slots.values())
    return nbytes, run.replica.numel


@pytest.mark.parametrize("state", ["replicated", "divided"])
def test_averages_are_eight_bytes_an_element_divided_where_the_state_is(
    pools: Pools, command: Any, tmp_path: Path, state: str
) -> None:
    found = pools(2).run(kept_bytes, command(tmp_path, sharding__optimizer_state=state))
    held = sum(nbytes for nbytes, _ in found)
    assert held == 8 * found[0][1] * (1 if state == "divided" else 2)


# -- mistakes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"adapter__tinit": 50}, "adapter.tinit"),
        ({"adapter__deltaT": 40}, "adapter.deltaT"),
        ({"adapter__target_r": 9}, "adapter.target_r"),
        ({"adapter__r": 8}, "adapter.r"),
        ({"adapter__rank_pattern": {"q_proj": 2}}, "adapter.rank_pattern"),
        ({"adapter__beta1": 0.5, "adapter__importance": "magnitude"}, "adapter.beta1"),
        ({"optimizer__name": "adamw8bit"}, "optimizer.name"),
    ],
)
def test_a_mistake_is_said_before_weights_are_read(
    pools: Pools, command: Any, tmp_path: Path, settings: dict[str, Any], key: str
) -> None:
    told = pools(1).run(refused, command(tmp_path, **settings))[0]
    assert key in told and "\n" not in told
    assert not (tmp_path / "metrics.jsonl").exists()
    assert torch.is_grad_enabled()
