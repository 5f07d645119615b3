"""`dlora watch`: from another process, beside a run that logs, is killed, resumes or ends."""

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from refusals import refusal
from rich.console import Console
from written_runs import MEASURED, USUAL, event, lines_of, write_run

from dlora.metrics.events import add_event
from dlora.metrics.log import MetricsLog
from dlora.report.following import GONE, RUNNING, SILENT, FollowedRun, Pulse, Tail
from dlora.report.watch import Latest, main, table
from dlora.runtime.run_lock import RunLock

SECONDS = 60.0
FIGURES = USUAL | MEASURED


@pytest.fixture
def watching() -> Iterator[Callable[[Path], subprocess.Popen[str]]]:
    """watching(directory): `dlora watch` as a process, without torch."""
    started = []

    def start(directory: Path) -> subprocess.Popen[str]:
        program = (
            "import sys; from dlora.runtime.exit_status import exit_with; from dlora.report.watch "
            "import main; assert 'torch' not in sys.modules; exit_with(main)"
        )
        process = subprocess.Popen(
            [sys.executable, "-c", program, str(directory)],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_it_follows_a_run_to_its_end(tmp_path: Path, watching: Any) -> None:
    """A run as it writes: the lock, its start, lines, an evaluation, its end."""
    lock = RunLock(tmp_path)
    lock.take()
    process = watching(tmp_path)
    log = MetricsLog(tmp_path, after=None, tensorboard=False)
    add_event(tmp_path, "start", 0, {"steps": 6})
    log.write({"step": 0, "eval_loss": 3.5})
    assert process.stdout.readline().startswith("step 0/6  held-out 3.5000")
    for line in lines_of(6, FIGURES):
        log.write(line | ({"eval_loss": 2.25} if line["step"] == 3 else {}))
        if line["step"] == 3:
            while "held-out 2.2500" not in (said := process.stdout.readline()):
                assert said, process.stderr.read()
            # three steps of half a second each
            assert said.startswith("step 3/6  loss "), said
            assert said.rstrip().endswith((":01 left", ":02 left")), said
    add_event(tmp_path, "finished", 6, {})
    lock.release()
    rest, _ = process.communicate(timeout=SECONDS)
    assert process.returncode == 0
    assert "step 6/6" in rest
    assert rest.splitlines()[-1] == "finished after step 6"


@pytest.mark.parametrize(
    ("kind", "values", "status", "said"),
    [
        ("finished", {}, 0, "finished after step 4"),
        ("stopped", {"cause": "SIGTERM"}, 1, "stopped after step 4: SIGTERM"),
        ("failed", {"why": "3 steps\nin a row"}, 1, "failed after step 4: 3 steps in a row"),
    ],
)
def test_of_a_run_that_is_over_it_shows_the_last_lines(
    kind: str, values: dict[str, Any], status: int, said: str, tmp_path: Path, capsys: Any
) -> None:
    events = [event("start", 0, steps=4), event(kind, 4, **values)]
    write_run(tmp_path / "run", lines_of(4, FIGURES), events=events)
    (tmp_path / "run/.lock").write_text("")  # as a run that has ended leaves it
    assert main([str(tmp_path / "run")]) == status
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == said
    assert lines[-2].startswith("step 4/4")


def test_several_adapters_have_a_line_each(tmp_path: Path, capsys: Any) -> None:
    for name, steps in (("short", 2), ("long", 5)):
        write_run(tmp_path / "adapters" / name, lines_of(steps, FIGURES))
    started = event("start", 0, steps=5, adapters={"short": 2, "long": 5})
    for record in (started, event("finished", 5)):
        add_event(tmp_path, record["event"], record["step"], record)
    assert main([str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines[:-1] if "2/2" in line or "5/5" in line] == [
        "long: step 5/5",
        "short: step 2/2",
    ]


def test_a_run_of_before_ends_with_its_log(tmp_path: Path, capsys: Any) -> None:
    write_run(tmp_path, lines_of(3, FIGURES))
    assert main([str(tmp_path)]) == 1
    *_, last, said = capsys.readouterr().out.splitlines()
    assert last.startswith("step 3  loss ")
    assert said == "no run is alive here; its log ends at step 3"


def test_a_killed_run_is_seen_and_may_start_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """The process that had the lock is dead; another start comes, and later none."""
    monkeypatch.setattr("dlora.report.watch.RESTART_SECONDS", 2.0)
    write_run(tmp_path, lines_of(2, FIGURES), events=[event("start", 0, steps=9)])
    dead = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True
    )
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    left = {"pid": int(dead.stdout), "host": os.uname().nodename, "kernel": boot}
    (tmp_path / ".lock").write_text(json.dumps(left))
    assert Pulse(tmp_path).state() == SILENT

    def again() -> None:
        lock = RunLock(tmp_path)
        lock.take()
        log = MetricsLog(tmp_path, after=1, tensorboard=False)  # from a checkpoint of step 1
        add_event(tmp_path, "start", 1, {"steps": 9})
        for line in lines_of(9, FIGURES)[1:]:
            log.write(line)
        time.sleep(1.0)
        lock.release()  # as if killed: no end is recorded

    restart = threading.Timer(1.0, again)
    restart.start()
    assert main([str(tmp_path)]) == 1
    restart.join()
    said = capsys.readouterr().out
    assert "step 9/9" in said
    assert said.splitlines()[-1].startswith("no run is alive here: it was killed")


def test_a_pulse_stops_without_a_heartbeat(tmp_path: Path) -> None:
    """Of a run on another host only the heartbeat is known."""
    now = 100.0
    pulse = Pulse(tmp_path, lambda: now)
    assert pulse.state() == GONE
    lock = tmp_path / ".lock"
    lock.write_text(json.dumps({"pid": 1, "host": "elsewhere", "kernel": "other"}))
    assert pulse.state() == RUNNING
    now = 119.0
    assert pulse.state() == RUNNING
    os.utime(lock)
    now = 130.0
    assert pulse.state() == RUNNING
    now = 151.0
    assert pulse.state() == SILENT
    for text in ("", "[1]", "{torn", "\x00" * 9):
        lock.write_text(text)
        assert pulse.state() == GONE


def test_lines_come_whole_and_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    tail = Tail(path)
    assert tail.new() == []
    path.write_text('{"step": 1}\n{"step": 2')
    assert tail.new() == [{"step": 1}]
    with open(path, "a") as file:
        file.write(', "loss": 1}\nnonsense\n[3]\n{"step": "x"}\n')
    assert tail.new() == [{"step": 2, "loss": 1}]
    assert tail.new() == []
    beside = tmp_path / "beside"  # as a resumed run writes its log anew
    beside.write_text('{"step": 1}\n{"step": 5}\n')
    os.replace(beside, path)
    assert tail.new() == [{"step": 1}, {"step": 5}]
    path.write_text("")
    assert tail.new() == []


def test_ctrl_c_ends_it(tmp_path: Path, watching: Any) -> None:
    lock = RunLock(tmp_path)
    lock.take()
    write_run(tmp_path, lines_of(1, FIGURES), events=[event("start", 0, steps=2)])
    process = watching(tmp_path)
    assert process.stdout.readline().startswith("step 1/2")
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=SECONDS)
    lock.release()
    assert (process.returncode, said) == (130, "")


def test_a_terminal_gets_a_table() -> None:
    latest = {"": Latest(total=200)}
    for line in lines_of(50, FIGURES):
        latest[""].take(line | {"eval_loss": 1.5})
    screen = io.StringIO()
    Console(file=screen, width=100, force_terminal=True, color_system=None).print(
        table("runs/[red]x", latest)
    )
    shown = screen.getvalue()
    for word in ("runs/[red]x", "50/200", "loss", "1.5000", "tokens/s", "left", "1:1"):
        assert word in shown
    several = {"a[b]": latest[""], "b": Latest()}
    Console(file=screen, width=120).print(table("x", several))
    assert "a[b]" in screen.getvalue()


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("nowhere", "RUN: nowhere: there is no such directory"),
        (".", "no run has written there"),
        ("file", "there is no such directory"),
    ],
)
def test_refusals(word: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    assert said in refusal(lambda: main([word]))
    assert "RUN" in refusal(lambda: FollowedRun(word))
