"""AdaLoRA interrupted in every phase: masks and adapter of the run that was not."""

import functools
import itertools
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from allocations import ADALORA, MODULES, watched
from ranks import Pools
from refusals import preparation, refusal
from run_training import Runs, figures, relative_error, same_bits
from safetensors.torch import load_file
from sampling import full, sampled

from dlora.train import main

# 14 steps: 3 of warm-up, masks after 4, 6, 8 and 10, 4 steps on what is left; saved at each.
SCHEDULE = {
    "train__max_steps": 14,
    "adapter__tinit": 3,
    "adapter__tfinal": 4,
    "output__save_every": 1,
    "output__keep_last": 99,
}
MASKS, LAST = [4, 6, 8, 10], 10
# The step in which it dies; the checkpoint is that of the step before.
CRASHES = {
    "before the first mask": 3,
    "between two masks": 8,
    "with the last mask in the checkpoint": 11,
    "in the final phase": 13,
}
FSDP2 = {"sharding__engine": "fsdp2", "sharding__base": "world"}
ZERO3 = {"sharding__engine": "zero3", "sharding__base": "world"}
DIVIDED = {"sharding__optimizer_state": "divided"}


@pytest.fixture(scope="module")
def command(words: Any) -> Any:
    """command(directory, **settings): the words of a run of 14 steps."""
    return functools.partial(words, **ADALORA | SCHEDULE)


@pytest.fixture(scope="module")
def whole(pools: Pools, command: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """whole(divided): the uninterrupted run on 2 ranks, (rank 0's result, its directory)."""

    @functools.cache
    def of(divided: bool) -> tuple[dict[str, Any], Path]:
        directory = tmp_path_factory.mktemp("whole")
        argv = command(directory, **FSDP2, **(DIVIDED if divided else {}))
        return pools(2).run(watched, argv)[0], directory

    return of


def as_of(step: int, origin: Path, directory: Path) -> Path:
    """A copy of a run's directory as it was when the run died in the step after `step`: files that
    are written with a checkpoint are of that step, the metrics may be further."""
    shutil.copytree(origin, directory)
    for checkpoint in (directory / "checkpoints").glob("step-*"):
        if int(checkpoint.name.removeprefix("step-")) > step:
            shutil.rmtree(checkpoint)
    masks = json.loads((directory / "ranks.json").read_text())
    kept = {number: ranks for number, ranks in masks.items() if int(number) <= step}
    (directory / "ranks.json").write_text(json.dumps(kept))
    return directory


def all_masks(*starts: dict[str, Any]) -> dict[int, Any]:
    return functools.reduce(lambda one, other: one | other["masks"], starts, {})


# -- the same world size ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("when", "divided"),
    sampled(
        [("with the last mask in the checkpoint", True)],
        itertools.product(CRASHES, (False, True)),
    ),
)
def test_a_crash(run: Runs, whole: Any, tmp_path: Path, when: str, divided: bool) -> None:
    """promise 2.7: the averages are in the checkpoint, so a resumed run has the same masks.

    promise 2.5: and the phase, and the triplets that are left.
    """
    wanted, origin = whole(divided)
    crash_in = CRASHES[when]
    where = FSDP2 | (DIVIDED if divided else {})
    started, _ = run("run", 2, work=watched, arguments=(crash_in,), **where)
    assert [result["status"] for result in started] == ["crashed"] * 2
    resumed, lines = run("run", 2, work=watched, **where)
    for before, after in zip(started, resumed, strict=True):
        assert min(after["averages"]) == crash_in  # it went on from the step before
        assert all_masks(before, after) == wanted["masks"]
        assert same_bits(after["tensors"], wanted["tensors"])
    for file, states in wanted["states"].items():
        assert same_bits(resumed[0]["states"][file], states)
    assert lines == figures(origin)
    # Every mask is there once, also those of the first start.
    assert (tmp_path / "run" / "ranks.json").read_bytes() == (origin / "ranks.json").read_bytes()
    assert list(json.loads((origin / "ranks.json").read_text())) == [str(step) for step in MASKS]


# -- another world size, another engine ------------------------------------------------------------


@pytest.mark.parametrize(
    ("saved", "world", "per_node", "where"),
    [
        (9, 3, 3, ZERO3 | DIVIDED),
        (10, 1, 1, {"sharding__base": "none"}),
        *(
            full(saved, *shape)
            for saved in (2, 7, 10, 12)
            for shape in (
                (4, 2, {"sharding__base": "node"}),
                (2, 2, ZERO3),
                (3, 3, FSDP2 | DIVIDED),
            )
        ),
    ],
)
def test_another_world_size_and_engine(
    run: Runs, whole: Any, saved: int, world: int, per_node: int, where: dict[str, str]
) -> None:
    wanted, origin = whole(False)
    directory = as_of(saved, origin, run.root / "run")
    results, _ = run("run", world, work=watched, per_node=per_node, **where)
    later = {step: kept for step, kept in wanted["masks"].items() if step > saved}
    for result in results:
        assert result["masks"] == later
        assert same_bits(result["tensors"], results[0]["tensors"])
        for name, tensor in wanted["tensors"].items():
            mine = result["tensors"][name]
            assert mine.shape == tensor.shape
            assert not tensor.numel() or relative_error(mine, tensor) < 1e-4, name
    ranks = json.loads((directory / "ranks.json").read_text())
    assert ranks == json.loads((origin / "ranks.json").read_text())


# -- what is in a checkpoint -----------------------------------------------------------------------


def test_files_of_a_checkpoint(whole: Any) -> None:
    wanted, origin = whole(False)
    for step in range(1, 15):
        directory = origin / "checkpoints" / f"step-{step:06d}"
        adapter = load_file(directory / "adapter.safetensors")
        scorer = load_file(directory / "scorer.safetensors")
        manifest = json.loads((directory / "manifest.json").read_text())
        assert "scorer.safetensors" in manifest["files"]
        triplets = manifest["method"]
        kept = wanted["masks"].get(max((m for m in MASKS if m <= step), default=0))
        assert triplets["kept"] == (kept or {module: [0, 1, 2, 3] for module in triplets["kept"]})
        assert len(triplets["kept"]) == MODULES
        assert triplets["shrunk"] == (step >= LAST)
        names = {n for n in adapter if n.endswith(("lora_A", "lora_B", "lora_E"))}
        assert len(names) == 3 * MODULES
        for module, left in triplets["kept"].items():
            rank = len(left) if step >= LAST else 4
            assert adapter[f"{module}.adapter.lora_A"].shape[0] == rank
            assert adapter[f"{module}.adapter.lora_B"].shape[1] == rank
            assert adapter[f"{module}.adapter.lora_E"].shape == (rank, 1)
        averages = ("exp_avg_ipt", "exp_avg_unc")
        by_name = {f"{name}.{average}": name for name in names for average in averages}
        assert scorer.keys() == (set() if step >= LAST else by_name.keys())
        for key, average in scorer.items():
            assert average.shape == adapter[by_name[key]].shape
            assert average.any() or step == 1  # λ is 0 in the first step, but for its own move


# -- what a resume refuses, and --check ------------------------------------------------------------


@pytest.mark.parametrize("saved", [7, 12])
@pytest.mark.parametrize(
    ("changed", "value", "said"),
    [
        ("train__max_steps", 16, "train.max_steps or train.epochs .* was 14 and is 16"),
        ("adapter__init_r", 5, "adapter.init_r was 4 and is 5"),
        ("adapter__target_r", 3, "adapter.target_r was 2 and is 3"),
        ("adapter__tinit", 2, "adapter.tinit was 3 and is 2"),
        ("adapter__tfinal", 3, "adapter.tfinal was 4 and is 3"),
        ("adapter__deltaT", 1, "adapter.deltaT was 2 and is 1"),
        ("adapter__beta1", 0.9, "adapter.beta1 was 0.85 and is 0.9"),
        ("adapter__beta2", 0.9, "adapter.beta2 was 0.85 and is 0.9"),
        ("adapter__orth_reg_weight", 0.1, "adapter.orth_reg_weight was 0.5 and is 0.1"),
        ("adapter__importance", "magnitude", "adapter.importance was 'uncertainty' and is"),
        ("adapter__budget_unit", "params", "adapter.budget_unit was 'triplets' and is 'params'"),
    ],
)
def test_another_schedule_is_another_run(
    command: Any, whole: Any, tmp_path: Path, saved: int, changed: str, value: Any, said: str
) -> None:
    checkpoint = whole(False)[1] / "checkpoints" / f"step-{saved:06d}"
    argv = command(tmp_path, output__resume=str(checkpoint), **{changed: value})
    assert re.search(said, refusal(preparation, argv))


def checked(argv: list[str]) -> int:
    return main([*argv, "--check"])


@pytest.mark.parametrize("saved", [full(2), 7, full(10), 14])  # whole, and shrunk
def test_check_of_a_run_to_go_on_with(run: Runs, whole: Any, saved: int) -> None:
    """With the shapes that the checkpoint says, which its budget is of."""
    directory = as_of(saved, whole(False)[1], run.root / "run")
    before = sorted(path.stat().st_mtime_ns for path in directory.rglob("*"))
    assert run("run", 1, work=checked)[0] == [0]
    assert sorted(path.stat().st_mtime_ns for path in directory.rglob("*")) == before
