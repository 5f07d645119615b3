"""The liveness probe: only a lock of this pod's that has gone silent speaks against a run."""

import ast
import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from k8s_manifests import K8S

from dlora.runtime.run_lock import RunLock

SCRIPT = K8S / "alive.py"
spec = importlib.util.spec_from_file_location("alive", SCRIPT)
assert spec is not None
assert spec.loader is not None
alive = importlib.util.module_from_spec(spec)
spec.loader.exec_module(alive)


def probe(directory: Path, seconds: float) -> int:
    """The command as the kubelet runs it."""
    return subprocess.run(
        [SCRIPT, str(directory), str(seconds)], stdout=subprocess.DEVNULL
    ).returncode


def test_a_run_that_beats_is_alive_and_a_silent_one_is_not(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    lock = RunLock(tmp_path, beat_seconds=0.05)
    lock.take()
    before = path.stat().st_mtime_ns
    time.sleep(0.5)
    assert path.stat().st_mtime_ns > before
    assert probe(tmp_path, 30) == 0
    lock._over.set()  # the process is frozen: it has the lock, and beats no more
    time.sleep(0.5)
    os.utime(path, (time.time() - 40, time.time() - 40))
    assert probe(tmp_path, 30) == 1
    assert probe(tmp_path, 900) == 0
    lock.release()
    os.utime(path, (time.time() - 40, time.time() - 40))
    assert probe(tmp_path, 30) == 0, "a run that has ended is not killed while it leaves"


@pytest.mark.parametrize(
    ("text", "age", "expected"),
    [
        ({"pid": 7, "host": "me"}, 10, True),
        ({"pid": 7, "host": "me"}, 901, False),
        ({"pid": 7, "host": "me"}, 2000, True),  # from before this container
        ({"pid": 7, "host": "other"}, 901, True),  # another pod leads the run
        ({"pid": 7}, 901, True),
        ([], 901, True),
        (None, 901, True),  # weights are fetched: nobody has the lock
    ],
)
def test_what_speaks_against_a_run(
    tmp_path: Path, text: object, age: float, expected: bool
) -> None:
    now = time.time()
    if text is not None:
        (tmp_path / ".lock").write_text(json.dumps(text))
        os.utime(tmp_path / ".lock", (now - age, now - age))
    found = alive.is_alive(str(tmp_path), 900, host="me", since=now - 1000, now=now)
    assert found is expected


def test_no_directory_is_no_reason() -> None:
    assert probe(Path("/nowhere/at/all"), 1) == 0


def test_the_age_of_this_container_is_that_of_process_1(tmp_path: Path) -> None:
    boot = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
    assert boot - 5 < alive.started() < time.time()
    lock = tmp_path / ".lock"
    lock.write_text(json.dumps({"host": socket.gethostname()}))
    os.utime(lock, (boot - 3600, boot - 3600))
    assert probe(tmp_path, 1) == 0, "a pod of this name held it before"


def test_the_probe_is_cheap() -> None:
    """It loads neither torch nor dlora, which a kubelet would wait for every minute."""
    tree = ast.parse(SCRIPT.read_text(encoding="utf-8"))
    modules = {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
    }
    assert modules <= sys.stdlib_module_names
    assert not any(isinstance(node, ast.ImportFrom) for node in ast.walk(tree))
