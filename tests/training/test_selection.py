"""The best adapter is kept, and a run that gets no better ends: as transformers decides."""

import json
import math
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import Pools
from refusals import preparation, refusal
from run_training import Run, Runs, told, train
from safetensors.torch import load_file
from sampling import full
from stopped_runs import after_step, crashed, handlers_kept, steps_saved
from tiny import save_chats
from transformers import EarlyStoppingCallback, TrainerControl, TrainerState, TrainingArguments

from dlora.config.load import parse
from dlora.evaluation.command import main
from dlora.io.files import finish_replacing, replaced_directory
from dlora.training.selection import Followed, Selection

METRIC = {"metric": "eval_loss"}
PATIENT = METRIC | {"patience": 2}
# At such a rate the loss falls and rises.
WILD: dict[str, Any] = {
    "optimizer__lr": 0.1,
    "optimizer__schedule": "constant",
    "optimizer__max_grad_norm": 0.0,
    "train__max_steps": 20,
    "output__eval_every": 2,
    "output__save_every": 6,
    "output__keep_last": 1,
}


def steps_of(values: dict[int, float], patience: int) -> tuple[int | None, int | None]:
    """(step that ends a run, step of the best value) as transformers' callback decides."""
    arguments = TrainingArguments(metric_for_best_model="eval_loss", greater_is_better=False)
    callback, state = EarlyStoppingCallback(patience), TrainerState()
    control, best = TrainerControl(), None
    for step, value in values.items():
        callback.on_evaluate(arguments, state, control, {"eval_loss": value})
        if state.best_metric is None or value < state.best_metric:
            state.best_metric, best = value, step
        if control.should_training_stop:
            return step, best
    return None, best


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=12), st.integers(1, 4))
def test_a_figure_is_followed_as_transformers_does(values: list[int], patience: int) -> None:
    ours, theirs = Followed("eval_loss", "min"), Followed("eval_bleu", "max")
    ended = None
    for step, value in enumerate(values):
        assert ours.see(step, float(value)) == theirs.see(step, -float(value))
        if ours.since >= patience:
            ended = step
            break
    assert (ended, ours.step) == steps_of(dict(enumerate(map(float, values))), patience)


def test_what_is_no_number_is_never_better() -> None:
    followed = Followed("eval_loss", "min")
    values = (math.nan, 2.0, -math.inf, math.nan, 1.0)
    assert [followed.see(i, v) for i, v in enumerate(values)] == [
        False, True, False, False, True
    ]  # fmt: skip


@pytest.fixture(scope="module")
def command(words: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """command(directory, **settings): a run that is evaluated on 6 chats."""
    held = str(save_chats(tmp_path_factory.mktemp("held") / "held.jsonl", 6))
    return lambda directory, **own: words(directory, **WILD | {"data__eval": held} | own)


@pytest.fixture(scope="module")
def whole(pools: Pools, command: Any, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The run to its end on 2 ranks."""
    return Runs(pools, command, tmp_path_factory.mktemp("whole"))("run", 2)


@pytest.fixture(scope="module")
def ends(whole: Run) -> tuple[int, int]:
    """(the step that ends the run, the step of its best evaluation)."""
    losses = {line["step"]: line["eval_loss"] for line in whole[1] if "eval_loss" in line}
    losses.pop(0)
    ended, best = steps_of(losses, PATIENT["patience"])
    assert ended is not None and best is not None and best < ended < 20
    return ended, best


def best_of(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "best/best.json").read_text())


def loss_of(adapter: Path, argv: list[str], to: Path) -> float:
    """By `dlora eval`."""
    held = argv[argv.index("--data.eval") + 1]
    to.unlink(missing_ok=True)
    assert main(["--adapter", str(adapter), "--data", held, "--to", str(to)]) == 0
    return json.loads(to.read_text())["figures"]["loss"]


def test_a_run_ends_early_and_its_best_is_kept(
    run: Runs, whole: Run, ends: tuple[int, int], tmp_path: Path
) -> None:
    """On all ranks alike; started again it is finished, and `keep_last` leaves the best alone."""
    both = {"output__early_stopping": PATIENT, "output__keep_best": METRIC}
    results, lines = run("run", 2, work=told, **both)
    ended, best = ends
    assert [result["status"] for result, _ in results] == [0, 0]
    assert lines[-1].pop("stopped_by") == "early_stopping" and lines[-1]["step"] == ended
    assert lines == [line for line in whole[1] if line["step"] <= ended]
    assert f"stopped early after step {ended}: eval_loss was not better than" in results[0][1]
    directory = tmp_path / "run"
    assert steps_saved(directory) == [f"step-{ended:06d}"] and (directory / "adapter").is_dir()
    about = best_of(directory)
    losses = {line["step"]: line.get("eval_loss") for line in lines}
    assert about == {"step": best, "metric": "eval_loss", "mode": "min", "value": losses[best]}
    argv = run.command(directory, **both)
    assert loss_of(directory / "best", argv, tmp_path / "best.json") == pytest.approx(
        losses[best], rel=1e-6
    )
    again, same = run("run", 2, work=told, **both)
    assert f"the run is already finished: step {ended} of 20; eval_loss was" in again[0][1]
    assert [result["status"] for result, _ in again] == [0, 0]
    assert same[:-1] == lines[:-1] and best_of(directory) == about
    # More patience, and it goes on.
    more = {"output__early_stopping": METRIC | {"patience": 10}, "output__keep_best": METRIC}
    _, rest = run("run", 2, **more)
    assert [line["step"] for line in rest] == [line["step"] for line in whole[1]]


def terminated(argv: list[str], step: int) -> dict[str, Any]:
    """A run of which the last rank alone gets SIGTERM in this step."""
    last = dist.get_rank() == dist.get_world_size() - 1
    with handlers_kept():
        kill = after_step(step, lambda: os.kill(os.getpid(), signal.SIGTERM))
        return train(argv, kill if last else None)


def committed_alone(argv: list[str], step: int) -> str:
    """A run that dies in a step, and commits its snapshot of the one before."""
    runs: list[Any] = []

    def meddle(run: Any) -> None:
        runs.append(run)
        after_step(step, fail)(run)

    def fail() -> None:
        raise InterruptedError

    try:
        train(argv, meddle)
    except InterruptedError:
        return runs[0].checkpoints.commit_alone(ending=True)
    return "finished"


@pytest.mark.parametrize("how", [full("crashed"), full("terminated"), "committed"])
def test_a_resumed_run_ends_where_it_would_have(
    run: Runs, whole: Run, ends: tuple[int, int], tmp_path: Path, how: str
) -> None:
    """Also where the checkpoint is a snapshot, which was taken before its step's evaluation."""
    both = {"output__early_stopping": PATIENT, "output__keep_best": METRIC}
    ended, best = ends
    last = ended - 2  # evaluated, and not better
    works = {"crashed": crashed, "terminated": terminated, "committed": committed_alone}
    run("run", 2, work=works[how], arguments=(last + 1,), **both)
    assert best_of(tmp_path / "run")["step"] == best
    results, lines = run("run", 2, **both)
    assert [result["status"] for result in results] == [0, 0]
    assert lines[-1].pop("stopped_by") == "early_stopping"
    wanted = [line for line in whole[1] if line["step"] <= ended]
    assert [line["step"] for line in lines] == [line["step"] for line in wanted]
    assert lines[-1] == wanted[-1]
    assert best_of(tmp_path / "run")["step"] == best


@pytest.mark.full  # three runs more
def test_a_best_that_is_gone_or_another_run_s_is_not_taken_for_this_one(
    run: Runs, ends: tuple[int, int], tmp_path: Path
) -> None:
    _, best = ends
    kept = {"output__keep_best": METRIC, "train__max_steps": best + 2}
    run("run", 1, **kept)
    directory = tmp_path / "run"
    stored = load_file(directory / "best/adapter_model.safetensors")
    shutil.rmtree(directory / "best")
    more = kept | {"train__max_steps": best + 4}
    [(_, said)], _ = run("run", 1, work=told, **more)
    assert f"the adapter of step {best} (eval_loss" in said and "is not in" in said
    assert best_of(directory)["step"] == best + 4
    # A fresh run renames it, also where a crash has left it under another name.
    (directory / "best").rename(directory / ".best.new")
    run("run", 1, **kept, output__resume="none")
    assert (directory / "best.old-1").is_dir() and best_of(directory)["step"] == best
    again = load_file(directory / "best/adapter_model.safetensors")
    assert all((again[name] == tensor).all() for name, tensor in stored.items())


@pytest.mark.full  # methods whose files the checkpoint tests read by default
@pytest.mark.parametrize(
    "own",
    [
        {"adapter__method": "adalora", "adapter__init_r": 4, "adapter__target_r": 2},
        {"adapter__init_lora_weights": "pissa"},
        {"adapter__method": "mola"},
        {"adapter__use_dora": True},
    ],
    ids=lambda own: "-".join(map(str, own.values())),
)
def test_the_best_of_every_method_has_the_loss_that_was_logged(
    run: Runs, tmp_path: Path, own: dict[str, Any]
) -> None:
    ranks = {"adapter__r": None, "adapter__lora_alpha": 8} if "adapter__init_r" in own else {}
    settings = own | ranks | {"output__keep_best": METRIC, "optimizer__lr": 2e-2}
    run("run", 2, **settings, train__max_steps=6, sharding__base="world")
    argv = run.command(tmp_path / "run", **settings)
    loss = loss_of(tmp_path / "run/best", argv, tmp_path / "best.json")
    assert loss == pytest.approx(best_of(tmp_path / "run")["value"], rel=1e-4)


def test_a_directory_is_replaced_as_a_whole(tmp_path: Path) -> None:
    """Wherever the crash was."""
    place = tmp_path / "best"
    for word in "ab":
        with replaced_directory(place) as folder:
            (folder / "file").write_text(word)
    assert (place / "file").read_text() == "b"
    shutil.copytree(place, tmp_path / ".best.new")
    (tmp_path / ".best.new/file").write_text("c")
    for moved in (False, True):
        root = tmp_path / f"{moved}"
        shutil.copytree(tmp_path, root, ignore=lambda _, names: {"False", "True"} & set(names))
        if moved:
            (root / "best").rename(root / ".best.old")
        finish_replacing(root / "best")
        assert (root / "best/file").read_text() == "c"
        assert [path.name for path in root.iterdir()] == ["best"]
    (place).rename(tmp_path / ".best.old")
    shutil.rmtree(tmp_path / ".best.new")
    finish_replacing(place)
    assert (place / "file").read_text() == "b"


@pytest.mark.parametrize(
    ("own", "said"),
    [
        (
            {"output__keep_best": {"mode": "min"}},
            "output.keep_best: metric is missing; the figures",
        ),
        (
            {"output__keep_best": {"metric": "loss"}},
            "output.keep_best: metric: 'loss'; the figures",
        ),
        ({"output__keep_best": METRIC | {"mode": "low"}}, "mode: expected min or max, got 'low'"),
        ({"output__keep_best": METRIC | {"patience": "1"}}, "'patience' is not a part of it"),
        ({"output__early_stopping": METRIC}, "output.early_stopping: patience: expected a whole"),
        ({"output__early_stopping": METRIC | {"patience": 0}}, "at least 1, got 0"),
        ({"output__early_stopping": {"metric": "eval_bleu", "patience": 1}}, "metric: 'eval_bleu'"),
        ({"output__keep_best": METRIC, "output__eval_every": 0}, "there are no evaluations"),
        ({"output__keep_best": METRIC, "data__eval": None}, "there are no evaluations"),
        ({"output__early_stopping": PATIENT, "data__eval": None}, "there are no evaluations"),
        ({"output__keep_best": METRIC, "output__remote": "memory://x"}, "output.remote; set one"),
    ],
)
def test_what_cannot_be_is_refused(
    command: Any, tmp_path: Path, own: dict[str, Any], said: str, no_weights_are_read: None
) -> None:
    assert said in refusal(preparation, command(tmp_path / "run", **own))


def test_a_state_that_no_run_writes_is_refused(run: Runs, tmp_path: Path) -> None:
    argv = run.command(tmp_path / "run", output__keep_best=METRIC)
    config = parse(argv, "dlora.train").config
    for state in ({"best": {"best": "low"}}, {"best": 3}, {"best": {"other": 1}}, {"seen": "x"}, 4):
        assert "nothing that a run writes" in refusal(
            Selection.of(config).load, {"evaluations": state}
        )
