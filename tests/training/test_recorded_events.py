"""What a run records beside its figures, and the page that it writes: `output.report`."""

import functools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import save_chats
from written_runs import taken_apart

from dlora.config.load import parse
from dlora.metrics.events import read_events
from dlora.metrics.log import read_metrics
from dlora.runtime.ranks import Ranks
from dlora.train import main
from dlora.training.record import log_healed

TWO = [{"name": "a", "adapter": {"r": 4}}, {"name": "b", "adapter": {"r": 2}}]


@pytest.fixture(scope="module")
def words(words: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The command line of a run with held-out data and samples."""
    held = save_chats(tmp_path_factory.mktemp("held") / "chats.jsonl", 2)
    return functools.partial(words, data__eval=str(held), output__samples=1)


@pytest.fixture(scope="module")
def ended(words: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has ended, with its page."""
    run = tmp_path_factory.mktemp("recorded") / "run"
    of_adalora = {"adapter__method": "adalora", "adapter__r": None, "adapter__init_r": 4}
    of_adalora |= {"adapter__target_r": 2, "adapter__tinit": 1, "adapter__tfinal": 1}
    settings = {"train__max_steps": 4, "output__save_every": 2, "output__report": True}
    assert main(words(run, **of_adalora | settings)) == 0
    return run


def kinds(run: Path) -> list[tuple[str, int]]:
    return [(e["event"], e["step"]) for e in read_events(run)]


def test_a_finished_run_has_its_page(ended: Path) -> None:
    events = read_events(ended)
    assert kinds(ended) == [("start", 0), ("sample", 0), ("sample", 4), ("finished", 4)]
    start, before, after, finished = events
    assert (start["steps"], start["ranks"], start["nodes"], start["device"]) == (4, 1, 1, "cpu")
    lines = read_metrics(ended / "metrics.jsonl")
    assert finished["measured"]["peak"] == max(r["peak_memory_bytes"] for r in lines[1:])
    assert start["planned"].keys() == finished["measured"].keys()
    assert (before["when"], after["when"]) == ("before training", "after training")
    assert before["prompt"] == after["prompt"]
    page = taken_apart((ended / "report.html").read_bytes())
    figures = {name for line in lines for name, v in line.items() if not isinstance(v, str)}
    drawn = {line["label"] for _, data in page.charts.values() for line in data["lines"]}
    assert drawn == figures - {"step"}
    assert len(page.section("plan").all("tbody")[0].all("tr")) == 4
    assert len(page.section("samples").all("article")) == 1
    assert page.section("ranks").all("table", "heat")
    assert "output.report" in page.section("settings").words


def test_a_resumed_run_records_its_restart(words: Any, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert main(words(run, train__max_steps=2, output__save_every=2)) == 0
    assert not (run / "report.html").exists()
    assert main(words(run, train__max_steps=3, output__report=True)) == 0
    assert kinds(run) == [
        *[("start", 0), ("sample", 0), ("sample", 2), ("finished", 2)],
        *[("start", 2), ("sample", 3), ("finished", 3)],
    ]
    (run / "report.html").unlink()
    # nothing is left to train, and the page is written all the same
    assert main(words(run, train__max_steps=3, output__report=True)) == 0
    page = taken_apart((run / "report.html").read_bytes())
    assert "restart" in page.section("events").words
    # another run in that directory has events of its own
    assert main(words(run, train__max_steps=1, output__resume="none")) == 0
    assert kinds(run) == [("start", 0), ("sample", 0), ("sample", 1), ("finished", 1)]
    assert (run / "events.jsonl.old-1").exists()


def test_a_page_that_cannot_be_written_changes_nothing_else(
    words: Any, tmp_path: Path, capsys: Any
) -> None:
    run = tmp_path / "run"
    (run / "report.html").mkdir(parents=True)
    (run / "report.html/file").touch()
    assert main(words(run, train__max_steps=1, output__report=True)) == 0
    said = capsys.readouterr()
    assert "output.report: the report could not be written" in said.err
    assert (run / "adapter/adapter_model.safetensors").exists()
    assert kinds(run)[-1] == ("finished", 1)


def test_events_that_cannot_be_written_cost_no_more(
    words: Any, tmp_path: Path, capsys: Any
) -> None:
    run = tmp_path / "run"
    settings = {"output__samples": 0, "output__save_every": 1}
    assert main(words(run, train__max_steps=1, **settings)) == 0
    (run / "events.jsonl").unlink()
    (run / "events.jsonl").mkdir()
    assert main(words(run, train__max_steps=2, **settings)) == 0
    assert "events.jsonl cannot be written" in capsys.readouterr().err


@pytest.mark.parametrize("rank", [0, 1])
def test_a_repaired_adapter_is_an_event_of_the_first_rank(
    rank: int, words: Any, tmp_path: Path
) -> None:
    """What `sharding.audit: heal` does is in tests/sharding/test_replica_guards.py."""
    replica = SimpleNamespace(reductions=10)
    config = parse(words(tmp_path, sharding__audit="heal"), "dlora.train").config
    log_healed(config, Ranks(rank, 2, torch.device("cpu"), None), replica, "the adapters")
    replica.healed("lora_A on rank 1")
    assert kinds(tmp_path) == ([("healed", 10)] if rank == 0 else [])


def test_adapters_of_one_run_share_its_page(words: Any, tmp_path: Path, capsys: Any) -> None:
    run = tmp_path / "run"
    settings = {"adapter__r": None, "adapter__lora_alpha": None, "train__max_steps": 2}
    argv = words(run, adapters=TWO, output__report=True, **settings)
    assert main(argv) == 0
    assert kinds(run) == [("start", 0), ("finished", 2)]
    assert read_events(run)[0]["adapters"] == {"a": 2, "b": 2}
    for name in ("a", "b"):
        own = kinds(run / "adapters" / name)
        assert own == [("sample", 0), ("sample", 2), ("finished", 2)]
        assert not (run / "adapters" / name / "report.html").exists()
    page = taken_apart((run / "report.html").read_bytes())
    assert page.tree.all("h1")[0].text == "run: a, b"
    assert len(page.section("samples").all("article")) == 2
    assert "sample, a, before training" in capsys.readouterr().out
