"""Trials of one configuration under Ray Tune; and spaces that no trial is started for."""

import json
from importlib import import_module
from pathlib import Path

import pytest
from ray_cluster import Cluster
from run_files import tiny_run
from tiny import save_chats

from dlora.config.load import SCHEMA, UsageError
from launchers.ray_sweep import configuration, main, read_space


@pytest.fixture(scope="module")
def run_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sweep")
    return tiny_run(
        root,
        data__eval=str(save_chats(root / "held.jsonl", 4)),
        train__max_steps=6,
        output__eval_every=3,
        output__dir=str(root / "swept"),
    )


@pytest.mark.parametrize("rates", [[3e-3], pytest.param([1e-3, 3e-3], marks=pytest.mark.full)])
def test_a_grid(ray: Cluster, run_file: Path, rates: list[float]) -> None:
    ranks, root = [2, 4], run_file.parent / f"grid-{len(rates)}"
    space = json.dumps({"adapter.r": ranks, "optimizer.lr": rates})
    where = ["--config", str(run_file), "--output.dir", str(root)]
    made = ray.run("launchers.ray_sweep", *where, "--space", space)
    assert made.returncode == 0, made.stdout + made.stderr
    trials = json.loads((root / "sweep.json").read_text())
    values = [(t["values"]["adapter.r"], t["values"]["optimizer.lr"]) for t in trials]
    assert sorted(values) == [(r, lr) for r in ranks for lr in rates]
    assert [t["figure"] for t in trials] == sorted(t["figure"] for t in trials)
    assert {t["step"] for t in trials} == {6} and not any(t["error"] for t in trials)
    for trial in trials:  # each is the run that its directory says
        [directory] = [
            path.parent
            for path in root.glob("*/config.yaml")
            if f"r: {trial['values']['adapter.r']}\n" in path.read_text()
            and f"lr: {trial['values']['optimizer.lr']}\n" in path.read_text()
        ]
        lines = [json.loads(t) for t in (directory / "metrics.jsonl").read_text().splitlines()]
        assert lines[-1]["eval_loss"] == pytest.approx(trial["figure"], rel=1e-9)
        assert (directory / "adapter/adapter_model.safetensors").is_file()
    assert (root / "sweep.png").read_bytes().startswith(b"\x89PNG")
    for trial in trials:
        assert f"{trial['figure']:.4f}" in made.stdout


@pytest.mark.full  # 80 s: six trials; a grid is always run
def test_draws_and_early_ends(ray: Cluster, run_file: Path) -> None:
    space = {"adapter.r": {"choice": [2, 4]}, "optimizer.lr": {"loguniform": [1e-6, 1e-2]}}
    root, steps = run_file.parent / "drawn", 24
    more = ["--samples", "6", "--scheduler", "asha", "--train.max_steps", str(steps)]
    argv = ["--config", str(run_file), "--space", json.dumps(space), "--output.dir", str(root)]
    made = ray.run("launchers.ray_sweep", *argv, *more)
    assert made.returncode == 0, made.stdout + made.stderr
    trials = json.loads((root / "sweep.json").read_text())
    assert len({t["values"]["optimizer.lr"] for t in trials}) == len(trials) == 6
    assert all(1e-6 <= t["values"]["optimizer.lr"] <= 1e-2 for t in trials)
    assert {t["step"] for t in trials} > {steps}  # some went all the way, some did not
    assert not any(t["error"] for t in trials)


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ("{}", "--space: expected {"),
        ("{adapter.r: [", "--space: while parsing"),
        ("{adapter.rank: [1]}", "--space: adapter.rank is not a key of the configuration"),
        ("{adapter.r: 4}", "--space: adapter.r: expected a list or one distribution"),
        ("{adapter.r: []}", "--space: adapter.r: expected a list or one distribution"),
        ("{adapter.r: [0]}", "adapter.r: must be >= 1"),
        ("{optimizer.lr: {normal: [0, 1]}}", "--space: optimizer.lr: normal is not one of uniform"),
        ("{optimizer.lr: {loguniform: [0, 1]}}", "--space: optimizer.lr: loguniform needs"),
        ("{optimizer.lr: {uniform: [2, 1]}}", "--space: optimizer.lr: uniform needs"),
        ("{train.seed: [1]}", "--space: train.seed is on the command line too"),
        ("nowhere.yaml", "--space: "),
        ("{adapter.r: {uniform: [2, 8]}}", "--space: adapter.r: uniform draws fractions"),
        ("{adapter.r: {randint: [2, 8.5]}}", "--space: adapter.r: randint needs integers"),
    ],
)
def test_a_wrong_space_is_one_line(run_file: Path, space: str, message: str) -> None:
    argv = ["--config", str(run_file), "--space", space, "--train.seed", "3"]
    with pytest.raises(UsageError) as refused:
        main(argv)
    assert str(refused.value).startswith(message) and "\n" not in str(refused.value)


def test_nobody_computes_the_figure(run_file: Path) -> None:
    argv = ["--config", str(run_file), "--space", "{adapter.r: [2]}", "--output.eval_every", "0"]
    with pytest.raises(UsageError, match="--metric: eval_loss needs data.eval"):
        main(argv)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--output.remote", "file:///x"], "output.remote: remove it, since trials"),
        (["--name", "x"], "--name: remove it, since trials"),
        (
            ["--scheduler", "asha", "--space", "{train.max_steps: [1, 2]}"],
            "--scheduler: asha compares trials by step",
        ),
        (
            ["--scheduler", "asha", "--output.eval_every", "6"],
            "--scheduler: asha compares trials while",
        ),
        (["--output.save_every", "2"], "output.save_every: a trial saves when it evaluates"),
        (["--space", "{output.save_every: [2]}"], "output.save_every: a trial saves when it"),
    ],
)
def test_what_trials_cannot_have(run_file: Path, more: list[str], message: str) -> None:
    space = [] if "--space" in more else ["--space", "{adapter.r: [2]}"]
    with pytest.raises(UsageError, match=message):
        main(["--config", str(run_file), *space, *more])


@pytest.mark.parametrize(
    ("more", "every"),
    [
        ({}, 3),
        ({"data.eval": "null", "output.eval_every": str(SCHEMA["output.eval_every"].default)}, 5),
        ({"output.eval_every": "0", "output.save_every": "0"}, 6),
    ],
)
def test_how_often_ray_is_told(run_file: Path, more: dict[str, str], every: int) -> None:
    """At evaluations; without them at saves, or at the end."""
    words = {"config": str(run_file), "output.save_every": "5"} | more
    assert configuration(words, {"adapter.r": 4}, Path("runs")).output.save_every == every


@pytest.mark.parametrize("low", ["1e-06", "1.0e-6", "0.000001"])
def test_a_small_number_is_one(low: str) -> None:
    space = read_space(f'{{"optimizer.lr": {{"loguniform": [{low}, 1e-2]}}}}')
    assert space == {"optimizer.lr": {"loguniform": [1e-6, 1e-2]}}


@pytest.mark.parametrize("module", ["ray_train", "ray_submit", "ray_sweep"])
def test_without_ray_it_is_one_line(
    run_file: Path, monkeypatch: pytest.MonkeyPatch, module: str
) -> None:
    monkeypatch.setattr("launchers.ray_train.find_spec", lambda name: None)
    space = ["--space", "{adapter.r: [2]}"] if module == "ray_sweep" else []
    with pytest.raises(UsageError, match=r"Ray is not installed: pip install 'dlora\[ray\]'"):
        import_module(f"launchers.{module}").main(["--config", str(run_file), *space])
