"""Steps without a finite loss are left out, tensors without a gradient are named, silence is shown.

A rank's loss becomes NaN where a hook on the model makes it so.
"""

import functools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from run_training import Runs, prepared_run

from dlora.checkpoint import format as checkpoint
from dlora.lora.attach import named_adapters
from dlora.lora.states import AdapterState
from dlora.metrics.events import read_events
from dlora.training.watchdogs import FiniteWatch

STEPS = 6


@pytest.fixture(scope="module")
def command(words: Any) -> Any:
    return functools.partial(words, model="blocks", train__max_steps=STEPS)


def poisoned(argv: list[str], steps: list[int], rank: int) -> dict[str, Any]:
    """A run whose loss is NaN on one rank in some steps; the flat values after each step."""
    run = prepared_run(argv)
    after: list[torch.Tensor] = []

    def poison(module: Any, args: Any, loss: torch.Tensor) -> torch.Tensor:
        bad = len(after) + 1 in steps and run.ranks.rank == rank
        return loss * float("nan") if bad else loss

    see = run.losses.see

    def seen(record: dict[str, Any], ids: Any) -> str | None:
        after.append(run.replica.values.clone())
        return see(record, ids)

    run.model.register_forward_hook(poison)
    run.losses.see = seen  # type: ignore[method-assign]
    status = run.train()
    drawn = [run.prepared.sampler.step(step - 1) for step in steps]
    return {"status": status, "after": after, "ids": [list(map(int, ids)) for ids in drawn]}


@pytest.mark.parametrize("method", ["lora", "adalora"])
def test_a_step_that_is_not_finite_is_left_out_on_every_rank(
    run: Runs, method: str, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"output__report": True}
    if method == "adalora":  # the mask falls in the very step that is left out
        settings |= {"adapter__method": method, "adapter__r": None, "adapter__tinit": 2}
        settings |= {"adapter__init_r": 4, "adapter__target_r": 2, "adapter__tfinal": 2}
        settings |= {"adapter__lora_alpha": 8}
    results, lines = run("run", 2, work=poisoned, arguments=([3], 1), **settings)
    for result in results:
        assert result["status"] == 0
        before, left_out, later = result["after"][1:4]
        assert torch.isfinite(result["after"][-1]).all()
        if method == "lora":
            assert torch.equal(before, left_out)
            assert not torch.equal(left_out, later)
    assert torch.equal(results[0]["after"][-1], results[1]["after"][-1])
    assert [line["step"] for line in lines if line["loss"] is None] == [3]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert "skipped" in (tmp_path / "run/report.html").read_text()
    if method == "adalora":
        assert lines[-1]["kept_ranks"] == lines[-1]["budget"]  # the schedule went on


def test_three_in_a_row_end_the_run_and_name_their_sequences(run: Runs, tmp_path: Path) -> None:
    results, _ = run("run", 2, work=poisoned, arguments=([2, 3, 4], 0))
    assert [result["status"] for result in results] == [1, 1]
    for result in results:
        assert len(result["after"]) == 4
        assert torch.equal(result["after"][0], result["after"][3])
    events = [(e["event"], e["step"]) for e in read_events(tmp_path / "run")]
    assert events == [("start", 0), *[("skipped", step) for step in (2, 3, 4)], ("failed", 4)]
    listed = json.loads((tmp_path / "run/nonfinite.json").read_text())
    assert listed == {
        str(step): ids for step, ids in zip((2, 3, 4), results[0]["ids"], strict=True)
    }
    checkpoint.verify(tmp_path / "run/checkpoints/step-000004")
    assert not (tmp_path / "run/adapter").exists()


def test_good_steps_between_bad_ones_are_no_row(capsys: pytest.CaptureFixture[str]) -> None:
    watch = FiniteWatch()
    for step, loss in enumerate([float("nan"), float("inf"), 1.0] * 3, start=1):
        assert watch.see({"step": step, "loss": loss, "grad_norm": 1.0}) is None
    watch.close()
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2
    assert said[1].startswith("warning: loss or gradient was not finite in 6 steps")


def half_used(argv: list[str]) -> tuple[int, int]:
    """A run in which one adapter takes no part; (status, steps made)."""
    run = prepared_run(argv)
    _, _, adapter = next(named_adapters(run.model))
    adapter.become(AdapterState.OFF)
    return run.train(), len(run.records)


@pytest.mark.parametrize(("allowed", "ended"), [(False, (1, 10)), (True, (0, 12))])
def test_tensors_that_nothing_trains_end_the_run(
    run: Runs, allowed: bool, ended: tuple[int, int]
) -> None:
    settings = {"train__max_steps": 12, "train__allow_unused": allowed}
    assert run("run", 2, work=half_used, **settings)[0] == [ended] * 2


def test_silence_shows_the_stack_of_every_thread() -> None:
    program = (
        "import threading, time; from dlora.training.watchdogs import HangWatch\n"
        "def other_thread(): time.sleep(2)\n"
        "threading.Thread(target=other_thread).start()\n"
        "def waits_for_a_peer(): time.sleep(1.5)\n"
        "with HangWatch(1.0).watching(): waits_for_a_peer()\n"
        "time.sleep(1.2)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0
    assert done.stderr.count("no progress for 0.9 s") == 1  # and none outside
    assert "waits_for_a_peer" in done.stderr and "other_thread" in done.stderr


def test_threads_that_start_and_end_survive_that_their_stacks_are_shown() -> None:
    """Frames that change while they are read have ended a process by SIGSEGV."""
    program = (
        "import threading, time; from dlora.training.watchdogs import HangWatch\n"
        "def recurses(n): return n and recurses(n - 1)\n"
        "def starts_threads():\n"
        "    while not over.is_set():\n"
        "        thread = threading.Thread(target=recurses, args=(100,))\n"
        "        thread.start(); thread.join()\n"
        "over = threading.Event()\n"
        "for _ in range(4): threading.Thread(target=starts_threads).start()\n"
        "for _ in range(30):\n"
        "    with HangWatch(0.01).watching(): time.sleep(0.1)\n"
        "over.set()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stderr.count(b"no progress") == 30
