"""What the other commands make of a configuration or a run with several adapters."""

import functools
import json
from pathlib import Path
from typing import Any

import pytest
from peft import PeftConfig
from ranks import Pools
from tiny import save_chats
from together_runs import Together

from dlora.adapters.open_adapter import open_adapter
from dlora.base.identity import identity
from dlora.base.model import find_base
from dlora.checkpoint.written_by import written_by
from dlora.config.load import load, parse
from dlora.errors import UsageError
from dlora.export.command import main as export
from dlora.library.describe import data_of, metrics_of, origins_of
from dlora.library.same_base import base_of
from dlora.metrics.log import read_metrics
from dlora.plan.command import Machines, survey
from dlora.plan.command import main as plan
from dlora.sharding.topology import Topology
from dlora.together.prepare import prepare_together
from dlora.training.show_data import main as show_data
from launchers.ray_train import main as ray_train

TWO = [
    {"name": "a", "adapter": {"r": 4, "target_modules": ["q_proj", "v_proj"]}},
    {"name": "b", "adapter": {"r": 2}, "optimizer": {"lr": 1e-4}, "train": {"seed": 3}},
]
OWN = {"adapter__r": None, "adapter__lora_alpha": None, "train__max_steps": 2}


@pytest.fixture(scope="module")
def command(words: Any) -> Any:
    return functools.partial(words, **OWN)


@pytest.fixture(scope="module")
def ran(pools: Pools, command: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run whose adapter `more` began with the adapter of another run."""
    root = tmp_path_factory.mktemp("several")
    together = Together(pools, command, root)
    [first] = together("first", 1, TWO)
    start = {"adapter": {"path": str(root / "first/adapters/b/adapter")}}
    [then] = together("run", 1, [TWO[0], {"name": "more", **start}])
    assert first["status"] == then["status"] == 0
    return root / "run"


def test_the_library_finds_what_the_run_recorded(ran: Path, saved_models: Any) -> None:
    known = find_base(saved_models("llama"))
    for name in ("a", "more"):
        adapter = ran / "adapters" / name / "adapter"
        settings = json.loads((adapter / "adapter_config.json").read_text())
        assert base_of(adapter, settings).identity == identity(known, known.skeleton())
        assert (
            metrics_of(adapter)["loss"]
            == read_metrics(adapter.parent / "metrics.jsonl")[-1]["loss"]
        )
        state = json.loads((ran / "checkpoints/step-000002/state.json").read_text())
        assert data_of(adapter) == state["adapters"][name]["data"]["fingerprint"]
    assert origins_of(ran / "adapters/a/adapter") == []
    [origin] = origins_of(ran / "adapters/more/adapter")
    assert origin["path"] == str(ran.parent / "first/adapters/b/adapter") and origin["sha256"]


def test_a_run_below_a_directory_of_that_name_is_its_own(ran: Path, tmp_path: Path) -> None:
    for run in (tmp_path, tmp_path / "adapters/a"):
        (run / "adapter").mkdir(parents=True)
        (run / "config.yaml").write_text("train: {seed: 1}\n")
    found = written_by(tmp_path / "adapters/a/adapter")
    assert found is not None and found.name is None
    assert found.directory == (tmp_path / "adapters/a").resolve()
    assert written_by(ran / "nowhere/x/adapter") is None


def test_an_adapter_is_opened_and_a_checkpoint_names_them(ran: Path, tmp_path: Path) -> None:
    source = open_adapter(ran / "adapters/a/adapter")
    assert source.config.r == PeftConfig.from_pretrained(ran / "adapters/a/adapter").r == 4
    places = [str(ran / "adapters" / name / "adapter") for name in ("a", "more")]
    for directory in (ran / "checkpoints/step-000002", ran):
        with pytest.raises(UsageError) as told:
            export(["--adapter", str(directory), "--to", str(tmp_path / "out")])
        assert all(place in str(told.value) for place in places)
        assert "\n" not in str(told.value)


def test_the_plan_is_that_of_the_run(
    command: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In all that does not depend on the data."""
    placed = {"sharding__base": "world", "sharding__engine": "fsdp2"}
    argv = command(tmp_path / "run", adapters=TWO, **placed)
    config = parse(argv, prog="dlora").config
    topology = Topology(0, 2, 2)
    run = prepare_together(config, topology, lambda line: None).budget
    planned = survey(config, Machines(gpus_per_node=2)).decision.plan
    assert planned.trainable == run.trainable
    assert planned.memory.replica == run.memory.replica
    assert planned.gathers == run.gathers and planned.reduction == run.reduction
    assert planned.workload.optimizers == run.workload.optimizers
    assert plan([*argv, "--gpus-per-node", "2"]) == 0
    printed = capsys.readouterr().out
    assert "2 adapters in one run: a, b" in printed and "run without graphs" in printed


def test_states_of_several_are_never_planned_as_divided(command: Any, tmp_path: Path) -> None:
    """Where nothing fits, one adapter's may be; those of several are whole on every rank."""
    argv = command(tmp_path / "run", adapters=TWO, sharding__base="world")
    tight = Machines(gpus_per_node=2, gpu_memory_gb=0.001)
    found = survey(parse(argv, prog="dlora").config, tight)
    assert found.decision.warning
    assert {c.plan.divided for c in found.candidates if c.plan is not None} == {False}


def test_records_of_each_data_set_are_shown(
    command: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = str(save_chats(tmp_path / "other.jsonl", 5))
    members = [*TWO, {"name": "c", "data": {"train": other}}]
    assert show_data([*command(tmp_path / "run", adapters=members), "--show", "0"]) == 0
    lines = capsys.readouterr().out.splitlines()
    [first, second] = [i for i, line in enumerate(lines) if line.startswith("adapters: ")]
    assert lines[first] == "adapters: a, b" and "24 records" in lines[first + 1]
    assert lines[second] == "adapters: c" and "5 records" in lines[second + 1]


def test_ray_is_refused(command: Any, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="adapters: Ray"):
        ray_train([*command(tmp_path / "run", adapters=TWO), "--num-workers", "2"])


def test_a_patch_has_the_list_or_is_refused(
    command: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = command(tmp_path / "run")
    file = tmp_path / "several.yaml"
    sections: dict[str, Any] = {"adapters": TWO}
    for key, value in zip(words[::2], words[1::2], strict=True):
        section, _, option = key.removeprefix("--").partition(".")
        sections.setdefault(section, {})[option] = _plain(value)
    file.write_text(json.dumps(sections))
    machines = ["--gpus-per-node", "2", "--gpu-memory-gb", "16", "--emit"]
    argv = ["--config", str(file)]
    assert load(file).adapters
    assert plan([*argv, *machines, "jobset"]) == 0
    assert "--sharding.optimizer_state=replicated" in capsys.readouterr().out
    with pytest.raises(UsageError, match="RayJob trains one adapter"):
        plan([*argv, *machines, "rayjob"])
    with pytest.raises(UsageError, match="put the list into"):
        plan([*argv, "--adapters", json.dumps(TWO[:1]), *machines, "jobset"])


def _plain(word: str) -> Any:
    try:
        return json.loads(word)
    except ValueError:
        return word
