"""Several trials of a sweep in each run: each as in a run of its own, and ASHA between them."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
from ranks import Pools
from ray_cluster import Cluster, ended, starts_in
from run_files import tiny_run
from run_training import figures, train
from tiny import save_chats

from dlora.config.adapters import configs_of
from dlora.config.load import UsageError, dump_yaml, load
from dlora.metrics.log import read_metrics
from launchers.ray_board import Board
from launchers.ray_sweep import main
from launchers.ray_train import Workers, placed
from launchers.sweep_runs import configuration, packs, together
from launchers.sweep_space import drawn_values

STEPS, EVERY = 8, 2
SPACE = {
    "adapter.r": {"choice": [2, 4]},
    "optimizer.lr": [3e-3, 1e-6],  # both in each run of two: the grid varies this key first
    "train.seed": [0, 1],
}
CLOSE = ("loss", "grad_norm", "eval_loss")


@pytest.fixture(scope="module")
def run_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("together")
    return tiny_run(
        root,
        data__eval=str(save_chats(root / "held.jsonl", 4)),
        train__max_steps=STEPS,
        output__eval_every=EVERY,
        output__dir=str(root / "swept"),
    )


@pytest.fixture(scope="module")
def alone(pools: Pools, run_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """alone(values): the metrics of the run that a sweep without --together makes of a trial."""

    def of(values: dict[str, Any]) -> list[dict[str, Any]]:
        directory = tmp_path_factory.mktemp("alone")
        file = directory / "config.yaml"
        config = configuration({"config": str(run_file)}, values, directory / "run")
        file.write_text(dump_yaml(config))
        [result] = pools(1).run(train, ["--config", str(file)])
        assert result["status"] == 0
        return figures(directory / "run")

    return of


def swept(ray: Cluster, run_file: Path, name: str, space: Any, *more: str, status: int = 0) -> Any:
    """The trials of a sweep, and what it printed."""
    root = run_file.parent / name
    words = ["--config", str(run_file), "--output.dir", str(root), "--space", json.dumps(space)]
    made = ray.run("launchers.ray_sweep", *words, *more)
    assert made.returncode == status, made.stdout + made.stderr
    return json.loads((root / "sweep.json").read_text()), made.stdout


def is_start_of(lines: list[dict[str, Any]], wanted: list[dict[str, Any]]) -> bool:
    """Whether they are the first lines of a trial's run alone, to 1e-5."""
    assert lines[0]["step"] == 0
    for got, expected in zip(lines, wanted, strict=False):
        for key in (key for key in CLOSE if key in expected):
            assert got[key] == pytest.approx(expected[key], rel=1e-5), (got["step"], key)
        assert got.get("batch_hash") == expected.get("batch_hash")
    return len(lines) <= len(wanted)


def test_each_is_its_own_run_and_asha_drops_those_behind(
    ray: Cluster, run_file: Path, alone: Any
) -> None:
    words = ["--together", "2", "--scheduler", "asha"]
    trials, printed = swept(ray, run_file, "asha", SPACE, *words)
    values = [(t["values"]["optimizer.lr"], t["values"]["train.seed"]) for t in trials]
    assert sorted(values) == [(1e-6, 0), (1e-6, 1), (3e-3, 0), (3e-3, 1)]
    assert [t["figure"] for t in trials] == sorted(t["figure"] for t in trials)
    assert not any(t["error"] for t in trials)
    runs: dict[Path, list[Any]] = {}
    for trial in trials:
        directory, wanted = Path(trial["directory"]), alone(trial["values"])
        lines = figures(directory)
        assert is_start_of(lines, wanted)
        last = {line["step"]: line for line in lines}[trial["step"]]
        assert last["eval_loss"] == pytest.approx(trial["figure"], rel=1e-9)
        if trial["dropped"]:  # in the step after it was judged
            assert lines[-1]["step"] == trial["step"] + 1 < STEPS
        else:
            assert lines[-1]["step"] == trial["step"] == STEPS and len(lines) == len(wanted)
        has_adapter = (directory / "adapter/adapter_model.safetensors").is_file()
        assert has_adapter is not trial["dropped"]
        runs.setdefault(directory.parents[1], []).append(trial["dropped"])
    assert sorted(len(dropped) for dropped in runs.values()) == [2, 2]
    assert {True, False} in [set(dropped) for dropped in runs.values()]  # one goes on alone
    best = next(trial for trial in trials if not trial["dropped"])
    assert f"{best['directory']}/adapter" in printed.replace("\n", "")


@pytest.mark.full  # 90 s: the same sweep twice
def test_the_sweep_without_it(ray: Cluster, run_file: Path) -> None:
    """Drawn from the same seed, trials have the same values and figures."""
    space = {"adapter.r": [2, 4], "optimizer.lr": {"loguniform": [1e-4, 1e-2]}}
    [one, three] = [
        swept(ray, run_file, f"by-{count}", space, "--samples", "2", "--together", count)[0]
        for count in ("1", "3")
    ]
    assert len(one) == len(three) == 4 and len({t["directory"] for t in three}) == 4
    for got, wanted in zip(three, one, strict=True):
        assert got["values"] == wanted["values"] and got["step"] == wanted["step"] == STEPS
        assert got["figure"] == pytest.approx(wanted["figure"], rel=1e-5)


@pytest.mark.full  # 60 s
def test_one_that_fails_does_not_end_the_others(ray: Cluster, run_file: Path) -> None:
    """One has a loss that is not finite; one is wrong, which the workers find out."""
    space = {"adapter.target_modules": ["all-linear", "nothing"], "optimizer.lr": [1e30, 3e-3]}
    more = ["--together", "4", "--optimizer.max_grad_norm", "0"]
    trials, _ = swept(ray, run_file, "failed", space, *more, status=1)
    found = {tuple(trial["values"].values()): trial for trial in trials}
    good, wild = found["all-linear", 3e-3], found["all-linear", 1e30]
    assert (good["error"], good["step"], trials[0]) == ("", STEPS, good)
    assert "no finite loss" in wild["error"]
    assert (Path(good["directory"]) / "adapter/adapter_model.safetensors").is_file()
    assert not (Path(wild["directory"]) / "adapter").exists()
    for lr in (1e30, 3e-3):
        assert "adapter.target_modules" in found["nothing", lr]["error"]
        assert found["nothing", lr]["step"] == 0


@pytest.mark.full  # 60 s
def test_a_run_that_loses_its_worker_goes_on(ray: Cluster, run_file: Path) -> None:
    """With the trials it had: one was dropped, and stays so."""
    root, log = run_file.parent / "lost", run_file.parent / "lost.log"
    space = {"optimizer.lr": [3e-3, 1e-6]}
    words = ["--config", str(run_file), "--output.dir", str(root), "--space", json.dumps(space)]
    words += ["--together", "2", "--scheduler", "asha"]
    words += ["--train.max_steps", "200", "--output.eval_every", "20"]
    with ray.running("launchers.ray_sweep", *words, log=log) as sweep:
        until = time.monotonic() + 300
        while time.monotonic() < until and not has_reached(root, 45):
            time.sleep(0.2)
        [worker] = ray.workers()
        worker.kill()
        assert ended(sweep, log) == 0, log.read_text()
    assert starts_in(log.read_text()) == 2
    kept, dropped = json.loads((root / "sweep.json").read_text())
    assert (kept["step"], kept["dropped"], dropped["dropped"]) == (200, False, True)
    lines = figures(Path(kept["directory"]))
    assert [line["step"] for line in lines] == list(range(201))
    assert figures(Path(dropped["directory"]))[-1]["step"] == dropped["step"] + 1


def has_reached(root: Path, step: int) -> bool:
    """Whether any trial has made so many steps."""
    files = root.glob("*/adapters/*/metrics.jsonl")
    return any(line["step"] >= step for file in files for line in read_metrics(file))


# Without Ray -------------------------------------------------------------------------------------


def test_draws_are_those_of_ray_tune(tmp_path: Path) -> None:
    from ray import tune
    from ray.tune.registry import register_trainable
    from ray.tune.search import BasicVariantGenerator

    register_trainable("nothing", lambda values: None)
    space = {"a": tune.grid_search([1, 2]), "b": tune.loguniform(1e-5, 1), "c": tune.choice("xyz")}
    searched = BasicVariantGenerator(random_state=3)
    spec = {"run": "nothing", "config": space, "num_samples": 3, "storage_path": str(tmp_path)}
    searched.add_configurations({"nothing": spec})
    wanted = list(iter(searched.next_trial, None))
    own = {"a": [1, 2], "b": {"loguniform": [1e-5, 1]}, "c": {"choice": ["x", "y", "z"]}}
    assert drawn_values(own, 3, seed=3) == [trial.config for trial in wanted]
    assert len(wanted) == 6


class Trials:
    """A board, and what it is told of trials; `loss` is the figure."""

    def __init__(self, steps: int | None, *runs: str) -> None:
        self.board = Board("loss", steps)
        for names in runs:
            self.board.begin(list(names), f"runs/{names}")

    def __call__(self, step: int, **losses: float) -> set[str]:
        return self.board.report({n: {"step": step, "loss": x} for n, x in losses.items()})


def test_rungs_are_over_all_runs() -> None:
    """Rungs at 1, 4 and 16 steps, where the best quarter goes on (arXiv:1810.05934)."""
    told = Trials(16, "ab", "cd")
    assert told(2, a=3.0, b=4.0) == {"b"}
    assert told(2, c=3.5, d=2.0) == {"c"}  # of another run than those it is compared with
    assert told(4, a=2.5, d=2.6) == {"d"}
    assert told(8, a=9.0) == set()  # no rung lies between
    assert told.board.behind("abcd") == {"b", "c", "d"} and told.board.behind("a") == set()


def test_what_a_run_makes_again_is_not_judged_again() -> None:
    told = Trials(16, "ab")
    assert told(2, a=3.0, b=4.0) == {"b"}
    assert told(2, a=5.0, b=1.0) == {"b"}
    assert {name: heard.figure for name, heard in told.board.heard().items()} == {"a": 3, "b": 4}


def test_the_last_step_drops_nobody() -> None:
    told = Trials(6, "ab")
    assert told(6, a=3.0, b=4.0) == set()
    told.board.left("b", "finished", "", {"step": 6, "loss": 4.0})
    assert (told.board.heard()["b"].standing, told.board.behind("ab")) == ("finished", set())


def test_without_asha_nobody_is_dropped() -> None:
    told = Trials(None, "ab")
    assert told(1, a=1.0, b=9.0) == set()
    told.board.left("b", "failed", "its loss is not finite", None)
    heard = told.board.heard()["b"]
    assert (heard.figure, heard.standing, heard.why) == (9.0, "failed", "its loss is not finite")


def test_a_run_has_the_values_of_its_trials(run_file: Path) -> None:
    """As a trial alone has them, read from a file of the run's configuration as workers do."""
    words = {"config": str(run_file), "optimizer.schedule": "linear"}
    values = [
        {"optimizer.lr": 1e-5, "adapter.target_modules": ["q_proj"], "train.max_steps": 7},
        {"optimizer.lr": 2.0, "adapter.target_modules": "all-linear", "adapter.use_dora": "true"},
        {"data.max_length": 100, "train.seed": 3},
    ]
    trials = {f"t{place}": of_trial for place, of_trial in enumerate(values)}
    runs = list(packs(trials, 2))
    assert [list(run) for run in runs] == [["t0", "t1"], ["t2"]]
    for run in runs:
        made = together(words, run, run_file.parent / "run")
        file = run_file.parent / "made.yaml"
        file.write_text(dump_yaml(made))
        for name, own in configs_of(load(file)).items():
            wanted = configuration(words, trials[name], own.output.directory)
            for section in ("adapter", "optimizer", "train", "data"):
                assert getattr(own, section) == getattr(wanted, section), (name, section)


def test_checkpoints_of_several_adapters_stay_where_they_are(run_file: Path) -> None:
    config = load(run_file, ["--adapters", "[{name: a}, {name: b}]"])
    made, place = placed(config, Workers())
    assert made.output.remote is None and place.storage == str(run_file.parent / "swept")
    with pytest.raises(UsageError, match="--storage: checkpoints of several adapters stay in"):
        placed(config, Workers(storage="/mnt/all"))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--space", "{model.dtype: [float32]}"], "--space: model.dtype: trials of a run differ"),
        (["--space", "{sharding.base: [none]}"], "--space: sharding.base: trials of a run differ"),
        (["--space", "{data.packing: [true]}"], "--space: data.packing is the same for all trials"),
        (["--together", "0"], "--together: must be >= 1"),
        (["--together", "two"], "--together: expected"),
        (["--adapter.modules_to_save", "[lm_head]"], "--together: adapter.modules_to_save: "),
        (
            ["--space", "{adapter.init_lora_weights: [true, lora_ga]}"],
            "--together: adapter.init_lora_weights: lora_ga starts one adapter at a time",
        ),
        (["--train.compile", "true"], "--together: train.compile: "),
        (["--output.metrics_port", "9000"], "--together: output.metrics_port: "),
        (["--storage", "/mnt/all"], "--storage: checkpoints of several adapters stay in output"),
        (["--adapters", "[{name: a}]"], "adapters: remove it; a sweep names its trials itself"),
        (["--output.remote", "file:///x"], "output.remote: remove it, since trials"),
    ],
)
def test_what_cannot_be_tried_together_is_one_line(
    run_file: Path, more: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ray.init", lambda *_, **__: pytest.fail("Ray was started"))
    space = [] if "--space" in more else ["--space", "{adapter.r: [2, 4]}"]
    sized = [] if "--together" in more else ["--together", "2"]
    with pytest.raises(UsageError) as refused:
        main(["--config", str(run_file), *space, *sized, *more])
    assert str(refused.value).startswith(message) and "\n" not in str(refused.value)


def test_values_that_do_not_fit_each_other_are_one_line(
    run_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each value alone is right, and a trial is drawn that is not."""
    monkeypatch.setattr("ray.init", lambda *_, **__: pytest.fail("Ray was started"))
    space = '{"adapter.method": ["lora", "adalora"], "adapter.use_dora": [false, true]}'
    with pytest.raises(UsageError) as refused:
        main(["--config", str(run_file), "--space", space, "--together", "2"])
    assert "adalora" in str(refused.value) and "\n" not in str(refused.value)
