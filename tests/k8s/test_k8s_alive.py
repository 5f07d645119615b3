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
assert spec is not None and spec.loader is not None
alive = importlib.util.module_from_spec(spec)
spec.loader.exec_module(alive)


def probe(directory: Path, seconds: float, age: float | None = None) -> int:
    """The command as the kubelet runs it, on a lock that was renewed `age` seconds ago."""
    if age is not None:
        os.utime(directory / ".lock", (time.time() - age, time.time() - age))
    command = [SCRIPT, str(directory), str(seconds)]
    return subprocess.run(command, stdout=subprocess.DEVNULL).returncode


def test_a_run_that_beats_is_alive_and_a_silent_one_is_not(tmp_path: Path) -> None:
    lock = RunLock(tmp_path, beat_seconds=0.05)
    lock.take()
    before = (tmp_path / ".lock").stat().st_mtime_ns
    time.sleep(0.5)
    assert (tmp_path / ".lock").stat().st_mtime_ns > before
    assert probe(tmp_path, 30) == 0
    lock._over.set()  # the process is frozen: it has the lock, and beats no more
    time.sleep(0.5)
    assert probe(tmp_path, 30, age=40) == 1
    assert probe(tmp_path, 900, age=40) == 0
    lock.release()
    assert probe(tmp_path, 30, age=40) == 0, "a run that has ended is not killed while it leaves"
    assert probe(Path("/nowhere/at/all"), 1) == 0


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


def test_the_age_of_this_container_is_that_of_process_1(tmp_path: Path) -> None:
    since_boot = time.clock_gettime(time.CLOCK_BOOTTIME)
    assert time.time() - since_boot - 5 < alive.started() < time.time()
    (tmp_path / ".lock").write_text(json.dumps({"host": socket.gethostname()}))
    assert probe(tmp_path, 1, age=since_boot + 3600) == 0, "an earlier pod of this name had it"


def test_the_probe_is_cheap() -> None:
    """It loads neither torch nor dlora, which a kubelet would wait for every minute."""
    nodes = [*ast.walk(ast.parse(SCRIPT.read_text(encoding="utf-8")))]
    imports = [alias.name for n in nodes if isinstance(n, ast.Import) for alias in n.names]
    assert set(imports) <= sys.stdlib_module_names
    assert not any(isinstance(node, ast.ImportFrom) for node in nodes)
