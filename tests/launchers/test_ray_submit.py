"""A run handed to a Ray cluster: packed, followed to its exit status, and only with the token."""

import io
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Pools
from ray.job_submission import JobDetails, JobStatus
from ray_cluster import ROOT, Cluster, starts_in
from run_files import write_run
from run_training import train
from safetensors.torch import load_file
from tiny import save_chats, save_model

from dlora.checkpoint import format as checkpoints
from dlora.config.load import UsageError
from dlora.errors import TransientError
from launchers import ray_submit
from launchers.ray_submit import Following, forwarded, main

STEPS = 6


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with a configuration and data; the model lies where the nodes see it."""
    root = tmp_path_factory.mktemp("place")
    save_model(root / "seen/model", "llama", torch.float32)
    (root / "packed/runs").mkdir(parents=True)
    save_chats(root / "packed/chats.jsonl", 24)
    (root / "packed/.env").write_text("A_SECRET=1")
    write_run(
        root / "packed/run.json",
        model__path=str(root / "seen/model"),
        data__train="chats.jsonl",
        sharding__base="world",
        train__max_steps=STEPS,
        output__save_every=3,
        output__dir="runs/tiny",
    )
    return root


def words(ray: Cluster, place: Path, *more: str) -> list[str]:
    return [
        *("--address", ray.url, "--working-dir", str(place / "packed")),
        *("--config", str(place / "packed/run.json"), "--num-workers", "2"),
        *("--storage", str(place / "stored"), *more),
    ]


def test_a_job_is_followed_to_its_end(ray: Cluster, place: Path, pools: Pools) -> None:
    """And what it has learnt is what one process learns without Ray."""
    made = ray.run("launchers.ray_submit", *words(ray, place, "--submission-id", "first"))
    assert made.returncode == 0, made.stdout + made.stderr
    assert made.stdout.startswith(f"submitted first to {ray.url}\n")
    assert f"step {STEPS}/{STEPS}" in made.stdout
    assert made.stdout.rstrip().endswith("first: succeeded")
    assert len(set(re.findall(r"ip=(\S+), pid=\d+\) world_rank", made.stdout))) == 2
    alone = ["--data.train", str(place / "packed/chats.jsonl"), "--output.dir"]
    pools(1).run(train, ["--config", str(place / "packed/run.json"), *alone, str(place / "alone")])
    ours, wanted = (
        load_file(place / path / "adapter/adapter_model.safetensors")
        for path in ("stored/tiny", "alone")
    )
    assert ours.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert (ours[name] - tensor).norm() <= 1e-5 * tensor.norm(), name
    assert not list((place / "packed/runs").iterdir())  # it ran on a copy
    copies = [file.parent for file in ray.root.rglob("chats.jsonl")]
    assert copies and not any((copy / ".env").exists() for copy in copies)


@pytest.mark.full  # 40 s: a job of its own; the status of a run that fails is that of `torchrun.sh`
def test_a_job_s_status_is_the_run_s(ray: Cluster, place: Path) -> None:
    """A mistake that only the workers can see is told once, and nothing is started again."""
    bad = place / "seen/bad.jsonl"
    bad.write_text('{"messages": 3}\n')
    one = [word if word != "2" else "1" for word in words(ray, place, "--data.train", str(bad))]
    made = ray.run("launchers.ray_submit", *one)
    assert made.returncode == 2, made.stdout + made.stderr
    printed = made.stdout + made.stderr
    told = [line for line in printed.splitlines() if line.startswith("dlora: error: ")]
    assert len(told) == 1 and f"{bad}:1" in told[0], printed
    assert starts_in(printed) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"RAY_AUTH_TOKEN_PATH": None, "HOME": "/nonexistent"}, "no token found"),
        ({"RAY_AUTH_TOKEN_PATH": None, "RAY_AUTH_TOKEN": "f" * 32}, "--address: "),
    ],
    ids=["none", "wrong"],
)
def test_without_the_token_it_is_refused(
    ray: Cluster, place: Path, changes: dict[str, Any], message: str
) -> None:
    made = ray.run("launchers.ray_submit", *words(ray, place), **changes)
    assert made.returncode == 2, made.stdout + made.stderr
    told = made.stderr.strip().splitlines()
    assert message in told[-1] and told[-1].startswith("dlora: error: ")
    assert "Traceback" not in made.stderr


STOP = """
import sys, time
from ray.job_submission import JobSubmissionClient
client = JobSubmissionClient(sys.argv[1])
client.stop_job("left")
while not client.get_job_status("left").is_terminal():
    time.sleep(0.2)
print(client.get_job_status("left").value)
"""


@pytest.mark.full  # 60 s: a job of its own
def test_ctrl_c_leaves_the_job_running_and_a_stop_commits(ray: Cluster, place: Path) -> None:
    """Where nobody can be asked what Ctrl-C means."""
    log, run = place / "followed.log", place / "left"
    more = ("--train.max_steps", "100000", "--output.save_every", "0", "--output.dir", str(run))
    followed_by = words(ray, place, "--submission-id", "left", *more)
    with ray.running("launchers.ray_submit", *followed_by, log=log) as followed:
        wait_for(lambda: "step 1/" in log.read_text())
        followed.send_signal(signal.SIGINT)
        assert followed.wait(30) == 130, log.read_text()
    assert "left continues without this program; ray job logs" in log.read_text()
    metrics = run / "metrics.jsonl"
    left_at = metrics.read_text().count("\n")
    wait_for(lambda: metrics.read_text().count("\n") > left_at + 3)
    stopped = subprocess.run(
        [sys.executable, "-c", STOP, ray.url],
        env=ray.environment,
        cwd=ROOT,
        text=True,
        capture_output=True,
        timeout=240,
    )
    assert stopped.stdout.split()[-1] == "STOPPED", stopped.stderr
    last = metrics.read_text().count("\n")
    checkpoints.verify(place / f"stored/left/step-{last:06d}")


def wait_for(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + 240
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)


# -- without a cluster -----------------------------------------------------------------------------


def test_what_is_forwarded(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    argv = [
        *("--address", "http://x:1", "--no-wait", "--config", "packed/run.json", "--use-gpu"),
        *("--num-workers=1:2", "--exclude", '["*.md"]', "--optimizer.lr", "1e-3"),
    ]
    assert forwarded(argv, Path("packed")) == [
        *("--config=run.json", "--use-gpu", "--num-workers=1:2", "--optimizer.lr=1e-3")
    ]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--model.path", "tuned"], "model.path: tuned/model.safetensors is not copied to"),
        (["--data.train", "*.pt"], "data.train: a.pt is not copied to the cluster"),
        (["--data.train", "mine/a.jsonl"], "data.train: mine/a.jsonl is not copied to"),
        (["--data.train", "../chats.jsonl"], "data.train: ../chats.jsonl is not inside the"),
        (["--data.train", "a**.jsonl"], "data.train: a**.jsonl: Invalid pattern"),
        (["--storage", "runs"], "--storage: runs is in the job's working directory, which is"),
        (["--output.resume", "none"], "output.resume: must be auto"),
        (["--resources", '{"GPU": 1}'], "--resources: GPU needs --use-gpu"),
        (["--num-workers", "2:1"], "--num-workers: 2 is more than 1"),
        (["--num-workers", "many"], "--num-workers: expected N or MIN:MAX, got 'many'"),
        (["--working-dir", "nowhere"], "--working-dir: nowhere is not a directory"),
        (["--resources", '{"CPU": 0}'], "resources['CPU']: must be > 0"),
        (["--check"], "--check is an option of dlora.train"),
        (["--adress", "x"], "--adress"),
    ],
)
def test_mistakes_cost_no_submission(
    place: Path, monkeypatch: pytest.MonkeyPatch, more: list[str], message: str
) -> None:
    monkeypatch.chdir(place / "packed")
    for path in ("tuned/model.safetensors", "a.pt", "mine/a.jsonl"):
        Path(path).parent.mkdir(exist_ok=True)
        Path(path).touch()
    Path(".gitignore").write_text("mine/\n")
    with pytest.raises(UsageError) as refused:
        storage = [] if "--storage" in more else ["--storage", "/stored"]
        main(["--address", "http://127.0.0.1:9", "--config", "run.json", *storage, *more])
    assert message in str(refused.value) and "\n" not in str(refused.value)


def test_a_cluster_that_does_not_answer_may_do_so_later(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Status 1, which is tried again."""
    monkeypatch.chdir(place / "packed")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "f" * 32)
    words = ["--address", "http://127.0.0.1:9", "--config", "run.json", "--storage", "/stored"]
    with pytest.raises(TransientError, match=r"^--address: http://127\.0\.0\.1:9: [^\n]+$"):
        main([*words, "--model.path", "./"])  # the working directory itself is packed


def test_a_configuration_elsewhere_is_refused(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    with pytest.raises(UsageError, match=r"--config: packed/run\.json is not inside the working"):
        forwarded(["--config", "packed/run.json"], place / "seen")


def test_what_would_go_with_the_job_is_refused(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place / "packed")
    with pytest.raises(UsageError, match=r"output\.dir: runs/tiny is in the job's working"):
        main(["--address", "http://127.0.0.1:9", "--config", "run.json"])


class Asked:
    """A client of which only the stop is wanted."""

    def __init__(self, error: Exception | None = None) -> None:
        self.stopped: list[str] = []
        self._error = error

    def stop_job(self, job: str) -> None:
        if self._error is not None:
            raise self._error
        self.stopped.append(job)


@pytest.mark.parametrize(
    ("answer", "goes_on", "stopped"), [("y", True, ["job"]), ("l", False, []), ("", True, [])]
)
def test_ctrl_c_asks(
    monkeypatch: pytest.MonkeyPatch, answer: str, goes_on: bool, stopped: list[str]
) -> None:
    """Stop it and see it end, leave it, or go on as if nothing had been pressed."""
    client = Asked()
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{answer}\n"))
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    assert Following(client, "job", "http://head:8265").ask() is goes_on
    assert client.stopped == stopped


@pytest.mark.parametrize("error", [RuntimeError("500"), ConnectionError("refused")])
def test_a_stop_that_does_not_arrive_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n"))
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    assert Following(Asked(error), "job", "http://head:8265").ask()
    assert f"job could not be stopped: {error}" in capsys.readouterr().out


class Answers:
    """A client that says one thing after another."""

    def __init__(self, *said: Any) -> None:
        self._said = list(said)

    async def tail_job_logs(self, job: str) -> Any:
        said = self._said.pop(0)
        if isinstance(said, Exception):
            raise said
        yield said

    def get_job_info(self, job: str) -> Any:
        return JobDetails(
            type="SUBMISSION",
            entrypoint="",
            status=JobStatus.RUNNING if self._said else JobStatus.FAILED,
            driver_exit_code=2,
        )


def test_a_log_that_breaks_off_is_followed_on(capsys: pytest.CaptureFixture[str]) -> None:
    """By an error or without one; what was printed is not printed again."""
    client = Answers("one\n", ConnectionError("gone"), "one\ntwo\n", "one\ntwo\nthree\n")
    assert Following(client, "job", "http://head:8265").status() == 2
    assert capsys.readouterr().out == "one\ntwo\nthree\njob: failed\n"


def test_ctrl_c_counts_while_the_cluster_does_not_answer(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Most of the time it is waited for then."""

    def pressed(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ray_submit.time, "sleep", pressed)
    monkeypatch.setattr("sys.stdin", io.StringIO())
    client = Answers(ConnectionError("gone"), "never")
    assert Following(client, "job", "http://head:8265").status() == 130
    assert "job continues without this program; ray job logs" in capsys.readouterr().out


def test_a_cluster_that_is_gone_is_no_mistake_of_the_user_s(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ray_submit, "SILENT_SECONDS", 0.0)
    assert Following(Answers(ConnectionError("gone")), "job", "http://head:8265").status() == 1
    assert "no longer answers (gone); job continues without this program" in capsys.readouterr().err
