"""Two runs do not share a directory, and a dead one does not keep it."""

import contextlib
import errno
import json
import multiprocessing
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
from tiny import command

from dlora.checkpoint.remote import RemoteCheckpoints
from dlora.errors import TransientError, UsageError
from dlora.runtime.console import console
from dlora.runtime.exit_status import exit_with
from dlora.runtime.run_lock import FILE_BYTES, NAME, RunLock
from dlora.train import main

Capsys = pytest.CaptureFixture[str]


def run_in(directory: Path, ready: Any) -> None:
    RunLock(directory).take()
    ready.set()
    threading.Event().wait()


@pytest.fixture
def holder(tmp_path: Path) -> Any:
    """Another process that runs in the directory."""
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    process = context.Process(target=run_in, args=(tmp_path, ready), daemon=True)
    process.start()
    assert ready.wait(60)
    yield process
    process.kill()
    process.join()


def tree(directory: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def test_a_second_run_is_refused_before_it_writes_or_fetches(
    tmp_path: Path,
    holder: Any,
    saved_models: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capsys,
) -> None:
    fetch = pytest.fail  # there is nothing to fetch, but a store to ask
    monkeypatch.setattr(RemoteCheckpoints, "fetch", lambda *_: fetch("a checkpoint was fetched"))
    remote = {"output__dir": str(tmp_path), "output__remote": f"file://{tmp_path}/store"}
    argv = command(saved_models("blocks"), tmp_path, **remote)
    before = tree(tmp_path)
    monkeypatch.setattr("sys.argv", ["dlora.train", *argv])
    with pytest.raises(SystemExit) as ended:
        exit_with(main)
    assert ended.value.code == 2
    errors = capsys.readouterr().err.splitlines()  # beside transformers' progress bars
    [line] = [text for text in errors if "dlora: error: " in text]
    where = f"process {holder.pid} on {os.uname().nodename} is running in {tmp_path};"
    assert line.startswith(f"dlora: error: output.dir: {where}")
    assert tree(tmp_path) == before


def test_a_check_needs_no_lock_and_writes_nothing(
    tmp_path: Path, holder: Any, saved_models: Any, capsys: Capsys
) -> None:
    """Also where the store has a newer checkpoint, and where there is no directory yet."""
    store = tmp_path / "store/step-000001"
    store.mkdir(parents=True)
    (store / "manifest.json").write_text("{}")
    remote = {"output__remote": f"file://{tmp_path}/store"}
    for directory in (tmp_path, tmp_path / "new"):
        argv = command(saved_models("blocks"), tmp_path, output__dir=str(directory), **remote)
        before = tree(tmp_path)
        assert main([*argv, "--check"]) == 0
        assert tree(tmp_path) == before
        assert not (tmp_path / "new").exists()
        assert "--check does not read file://" in capsys.readouterr().out


def test_the_lock_of_a_killed_run_is_free_at_once(
    tmp_path: Path, holder: Any, capsys: Capsys
) -> None:
    holder.kill()
    holder.join()
    lock = RunLock(tmp_path)
    lock.take()
    assert json.loads((tmp_path / NAME).read_text())["pid"] == os.getpid()
    lock.release()
    RunLock(tmp_path).take()
    assert capsys.readouterr().out == ""


def elsewhere(directory: Path, host: str = "other-host") -> Path:
    """The lock of a run on another host, which this one's kernel knows nothing of."""
    path = directory / NAME
    path.write_text(json.dumps({"pid": 7, "host": host, "kernel": "of another machine"}))
    return path


@contextlib.contextmanager
def repeated(work: Callable[[], object]) -> Iterator[None]:
    """Ten times a second, as another host would beat."""
    over = threading.Event()

    def run() -> None:
        while not over.wait(0.1):
            work()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@pytest.mark.parametrize("host", ["other-host", os.uname().nodename])
def test_a_silent_lock_of_another_host_is_taken_over(
    tmp_path: Path, host: str, capsys: Capsys
) -> None:
    """A pod of the same name on another node is another host, too."""
    elsewhere(tmp_path, host)
    RunLock(tmp_path, beat_seconds=0.2, stale_seconds=0.5).take()
    waits, takes = capsys.readouterr().out.splitlines()
    assert f"process 7 on {host} was running here" in waits
    assert "taking over" in takes


def test_a_lock_that_its_server_frees_late_is_waited_for(
    tmp_path: Path, holder: Any, capsys: Capsys
) -> None:
    """An NFS server frees the locks of a host that died when its lease is over."""
    elsewhere(tmp_path)
    later = threading.Timer(1.0, holder.kill)
    later.start()
    lock = RunLock(tmp_path, beat_seconds=0.2, stale_seconds=0.3, lease_seconds=60)
    lock.take()
    later.join()
    assert "taking over" in capsys.readouterr().out
    assert json.loads((tmp_path / NAME).read_text())["pid"] == os.getpid()


def test_a_lock_that_its_server_keeps_is_refused_with_its_file(tmp_path: Path, holder: Any) -> None:
    path = elsewhere(tmp_path)
    lock = RunLock(tmp_path, beat_seconds=0.2, stale_seconds=0.3, lease_seconds=0.3)
    with pytest.raises(TransientError, match="process 7 on other-host has no heartbeat") as caught:
        lock.take()
    assert f"keeps its lock on {path}" in str(caught.value)


def test_another_host_s_lock_holds_while_it_beats(tmp_path: Path) -> None:
    path = elsewhere(tmp_path)
    refused = pytest.raises(UsageError, match="process 7 on other-host is running in")
    with repeated(lambda: os.utime(path)), refused:
        RunLock(tmp_path, beat_seconds=0.2, stale_seconds=20).take()


def test_an_earlier_start_of_the_same_run_passes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, holder: Any
) -> None:
    """As on a host that was cut off from what starts the ranks, and not from the file system."""
    told = json.loads((tmp_path / NAME).read_text()) | {"run": "run of one job"}
    (tmp_path / NAME).write_text(json.dumps(told))
    monkeypatch.setenv("DLORA_RUN_ID", "run of one job")
    lock = RunLock(tmp_path, beat_seconds=0.2, stale_seconds=0.5, lease_seconds=6)
    with pytest.raises(TransientError, match=f"process {holder.pid} .* start of this run, still"):
        lock.take()
    monkeypatch.setenv("DLORA_RUN_ID", "run of another job")
    with pytest.raises(UsageError, match="is running in"):
        RunLock(tmp_path, beat_seconds=0.2).take()


def replace(path: Path, text: str) -> None:
    """In one write, as a lock does."""
    with path.open("r+") as file:
        file.write(text.ljust(FILE_BYTES))


def test_of_two_that_wait_the_second_is_refused_for_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The dead one was an earlier start of this run, and the one that has its lock now is not."""
    path = elsewhere(tmp_path)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"run": "run of one job"}))
    monkeypatch.setenv("DLORA_RUN_ID", "run of one job")
    first = json.dumps({"pid": 8, "host": "third-host", "kernel": "a third"})
    waits: list[str] = []
    monkeypatch.setattr(console, "info", waits.append)
    refused = pytest.raises(UsageError, match="process 8 on third-host is running in")
    with repeated(lambda: waits and replace(path, first)), refused:  # once this one waits
        RunLock(tmp_path, beat_seconds=0.2, stale_seconds=20).take()
    assert "process 7 on other-host was running here" in waits[0]


def test_a_directory_that_is_gone_is_not_how_a_run_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = RunLock(tmp_path)
    lock.take()

    def gone(descriptor: int, length: int) -> None:
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr("os.ftruncate", gone)
    lock.release()
    monkeypatch.undo()
    RunLock(tmp_path).take()  # it was let go all the same


@pytest.mark.parametrize("lives", [True, False])
def test_where_files_have_no_locks_the_heartbeat_tells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, holder: Any, lives: bool
) -> None:
    def unknown(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOSYS, "as Lustre without its option flock")

    monkeypatch.setattr("fcntl.flock", unknown)
    if not lives:
        holder.kill()
        holder.join()
    lock = RunLock(tmp_path, beat_seconds=0.2, stale_seconds=20 if lives else 0.5)
    if lives:
        with pytest.raises(UsageError, match=f"process {holder.pid} on .* is running in"):
            lock.take()
    else:
        lock.take()
        assert json.loads((tmp_path / NAME).read_text())["pid"] == os.getpid()


def test_a_lock_beats(tmp_path: Path) -> None:
    lock = RunLock(tmp_path, beat_seconds=0.05)
    lock.take()
    before = (tmp_path / NAME).stat().st_mtime_ns
    deadline = time.monotonic() + 10
    while (tmp_path / NAME).stat().st_mtime_ns == before:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    lock.release()
    lock.release()  # and once more does nothing


STOPPED = """
import os, signal, time
from dlora.metrics.progress import StepDisplay
from dlora.runtime.exit_status import exit_with
from dlora.runtime.run_lock import RunLock
from dlora.train import main

RunLock.__init__.__kwdefaults__.update(beat_seconds=0.1, stale_seconds=0.5)

def update(display, record, of_method=""):
    if record["step"] == 3:
        time.sleep(1)  # the save of step 2 is written by then
        os.kill(os.getpid(), signal.SIGSTOP)

StepDisplay.update = update
exit_with(main)
"""


def is_stopped(process: Any) -> bool:
    assert process.poll() is None
    return "State:\tT" in Path(f"/proc/{process.pid}/status").read_text()


def test_a_stopped_run_that_lost_its_lease_writes_nothing_more(
    tmp_path: Path, saved_models: Any
) -> None:
    """As on a suspended node: another run has taken the directory when it continues."""
    out, every = tmp_path / "run", {"train__max_steps": 9, "output__save_every": 2}
    words = command(saved_models("blocks"), tmp_path, **every)
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, "-c", STOPPED, *words], **pipes)
    try:
        until = time.monotonic() + 280
        while not is_stopped(process):
            assert time.monotonic() < until
            time.sleep(0.1)
        time.sleep(1)
        (out / NAME).unlink()  # this kernel's lock outlives the stop; another host's would not show
        lock = RunLock(out)
        lock.take()
        before = tree(out)
        process.send_signal(signal.SIGCONT)
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 1
        [line] = [text for text in errors.decode().splitlines() if "dlora: error: " in text]
        assert f"process {os.getpid()} on {os.uname().nodename} has taken over {out}" in line
        assert tree(out) == before
        lock.release()
    finally:
        process.kill()
        process.wait()
