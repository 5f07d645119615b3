"""Invariant 5: a run that was interrupted and resumed is the run that was not."""

import functools
import hashlib
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from ranks import Pools
from run_training import Run, Runs, check_near, figures, told, train
from sampling import full
from stopped_runs import check_equal, crashed, handlers_kept, steps_saved, terminated

from dlora.base.model import BaseModel

STEPS, SAVED = 8, 3  # a checkpoint every 3 steps
CRASHED = 6  # while in this step


def terminated_while_loading(argv: list[str]) -> dict[str, Any]:
    """A run of which the last rank gets SIGTERM while it reads weights."""
    load = BaseModel.load

    def signalled(*args: Any) -> Any:
        if dist.get_rank() == dist.get_world_size() - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return load(*args)

    BaseModel.load = signalled  # type: ignore[method-assign]
    try:
        with handlers_kept():
            return train(argv)
    finally:
        BaseModel.load = load  # type: ignore[method-assign]


@pytest.fixture(scope="module")
def command(words: Any) -> Any:
    """command(directory, **settings): the words of a run of 8 steps, with dropout."""
    common = {"output__save_every": SAVED, "train__max_steps": STEPS}
    return functools.partial(words, adapter__lora_dropout=0.1, **common)


@pytest.fixture(scope="module")
def whole(pools: Pools, command: Any, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The uninterrupted run on 2 ranks."""
    return Runs(pools, command, tmp_path_factory.mktemp("whole"))("run", 2)


@pytest.fixture(scope="module")
def interrupted(pools: Pools, command: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run on 2 ranks that crashed."""
    directory = tmp_path_factory.mktemp("interrupted")
    assert pools(2).run(crashed, command(directory), CRASHED) == ["crashed"] * 2
    assert [line["step"] for line in figures(directory)] == list(range(1, CRASHED))
    assert steps_saved(directory) == ["step-000003"]
    return directory


def test_a_crash(run: Runs, whole: Run, interrupted: Path, tmp_path: Path) -> None:
    """promise 3.2: a resumed run is the uninterrupted one."""
    directory = shutil.copytree(interrupted, tmp_path / "run")
    with open(directory / "metrics.jsonl", "a") as metrics:
        metrics.write('{"step": 6, "lo')  # the line that was being written
    check_equal(run("run", 2), whole)
    assert steps_saved(directory) == ["step-000006", "step-000008"]


def test_masks_of_an_older_checkpoint_are_told_of(
    run: Runs, interrupted: Path, tmp_path: Path
) -> None:
    """As it was written when masks were drawn from generators, by manifests of format 1."""
    saved = shutil.copytree(interrupted, tmp_path / "run") / "checkpoints" / "step-000003"
    state = json.loads((saved / "state.json").read_text())
    state["random"]["keyed_by"] = ["seed", "step", "sequence"]
    content = json.dumps(state).encode()
    (saved / "state.json").write_bytes(content)
    manifest = json.loads((saved / "manifest.json").read_text())
    digest = hashlib.sha256(content).hexdigest()
    manifest["files"]["state.json"] = {"bytes": len(content), "sha256": digest}
    del manifest["sha256"]
    (saved / "manifest.json").write_text(json.dumps(manifest | {"format": 1}))
    [(_, said), _], _ = run("run", 2, work=told, train__max_steps=4)
    assert "drew dropout masks otherwise: from here on they differ" in said
    [(_, said), _], _ = run("run", 2, work=told, train__max_steps=5)
    assert "resuming after step 4" in said and "otherwise" not in said


@pytest.mark.parametrize(
    ("work", "saved"),
    [  # all ranks learn of the signal with the gradients of the next step
        pytest.param(terminated, ["step-000003", "step-000005"], id="in a step"),
        pytest.param(terminated_while_loading, ["step-000001"], id="while weights are read"),
    ],
)
def test_sigterm_on_one_rank(run: Runs, whole: Run, work: Any, saved: list[str]) -> None:
    stopped, _ = run("run", 2, work=work)
    assert [result["status"] for result in stopped] == [143, 143]
    assert steps_saved(run.root / "run") == saved
    check_equal(run("run", 2), whole)


@pytest.mark.parametrize(
    # 4 s each: one process and two nodes are in `test_divided_runs.py`
    ("world", "per_node", "base"),
    [full(1, 1, "world"), (3, 3, "world"), full(4, 2, "node")],
)
def test_another_world_size(
    run: Runs, whole: Run, interrupted: Path, tmp_path: Path, world: int, per_node: int, base: str
) -> None:
    """promise 3.3: checkpoints know no world size."""
    shutil.copytree(interrupted, tmp_path / "run")
    settings = {"sharding__base": base, "train__micro_batch_size": 3}
    again = run("run", world, per_node=per_node, **settings)
    assert again[1][:SAVED] == whole[1][:SAVED]
    check_near(again, whole)


def test_a_checkpoint_moves_between_engines(run: Runs, whole: Run) -> None:
    """From fsdp2 on 2 ranks to zero3 on 3, to one process, to zero3 on 2 nodes of 2, and back."""
    for world, per_node, engine, base, steps in (
        (2, 2, "fsdp2", "world", 3),
        (3, 3, "zero3", "world", 2),
        (1, 1, "fsdp2", "none", 2),
        (4, 2, "zero3", "node", 2),
    ):
        where = {"sharding__engine": engine, "sharding__base": base, "output__save_every": 1}
        stopped = run("run", world, work=crashed, arguments=(steps,), per_node=per_node, **where)
        assert stopped[0] == ["crashed"] * world
    again = run("run", 2, sharding__engine="fsdp2", sharding__base="world", output__save_every=1)
    assert [line["step"] for line in again[1]] == list(range(1, STEPS + 1))
    check_near(again, whole)


def test_zero3_resumes_bit_for_bit(run: Runs) -> None:
    where = {"sharding__engine": "zero3", "sharding__base": "world"}
    wanted = run("whole", 2, **where)
    stopped, _ = run("run", 2, work=crashed, arguments=(CRASHED,), **where)
    assert stopped == ["crashed"] * 2
    again = run("run", 2, **where)
    for line in (*again[1], *wanted[1]):
        del line["wire_bytes"]  # more in a process's first steps, until DeepSpeed has its trace
    check_equal(again, wanted)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-8])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "file", "warning"),
    [
        (truncate, "optimizer.safetensors", "is missing or has the wrong size"),
        (flip, "adapter.safetensors", "does not match its SHA-256"),
        (Path.unlink, "state.json", "is missing or has the wrong size"),
        (truncate, "manifest.json", "cannot be read"),
    ],
)
def test_a_damaged_newest_checkpoint_is_skipped(
    run: Runs, whole: Run, tmp_path: Path, interrupted: Path, damage: Any, file: str, warning: str
) -> None:
    directory = shutil.copytree(interrupted, tmp_path / "run")
    newest = shutil.copytree(
        directory / "checkpoints/step-000003", directory / "checkpoints/step-000004"
    )
    damage(newest / file)
    for left in (".step-000005.1-77.tmp", ".step-000004.0-78.old"):  # by a crash during a save
        shutil.copytree(newest, directory / "checkpoints" / left)
    results, lines = run("run", 2, work=told)
    check_equal(([result for result, _ in results], lines), whole)
    [(_, said), (_, silence)] = results
    skipped = [line for line in said.splitlines() if "skipping" in line]
    assert len(skipped) == 1 and str(newest / file) in skipped[0] and warning in skipped[0]
    assert "resuming after step 3" in said and silence == ""
    assert not list((directory / "checkpoints").glob(".step-*"))


def test_a_finished_run_is_left_alone(run: Runs, tmp_path: Path) -> None:
    run("run", 2, train__max_steps=2)
    metrics = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    [(result, printed), _], _ = run("run", 2, work=told, train__max_steps=2)
    assert result["status"] == 0
    assert "the run is already finished" in printed
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == metrics
