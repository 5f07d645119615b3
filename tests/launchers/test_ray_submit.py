"""A run handed to a Ray cluster: packed, followed to its exit status, and only with the token."""

import io
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from ray_cluster import ROOT, Cluster, starts_in
from run_files import write_run
from safetensors.torch import load_file
from tiny import save_chats, save_model

from dlora.config import UsageError
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


def test_a_job_is_followed_to_its_end(ray: Cluster, place: Path) -> None:
    made = ray.run("launchers.ray_submit", *words(ray, place, "--submission-id", "first"))
    assert made.returncode == 0, made.stdout + made.stderr
    assert made.stdout.startswith(f"submitted first to {ray.url}\n")
    assert f"step {STEPS}/{STEPS}" in made.stdout
    assert made.stdout.rstrip().endswith("first: succeeded")
    alone = ray.run("dlora", "launch", "--config", str(place / "packed/run.json"),
                    "--data.train", str(place / "packed/chats.jsonl"),
                    "--output.dir", str(place / "alone"))  # fmt: skip
    assert alone.returncode == 0, alone.stderr
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


def test_a_job_s_status_is_the_run_s(ray: Cluster, place: Path) -> None:
    made = ray.run(
        "launchers.ray_submit", *words(ray, place, "--adapter.target_modules", '["nowhere"]')
    )
    assert made.returncode == 2, made.stdout + made.stderr
    assert "dlora: error: adapter.target_modules" in made.stdout
    assert starts_in(made.stdout + made.stderr) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"RAY_AUTH_TOKEN_PATH": None, "HOME": "/nonexistent"}, "there is no token"),
        ({"RAY_AUTH_TOKEN_PATH": None, "RAY_AUTH_TOKEN": "f" * 32}, "address: "),
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


@pytest.mark.full
def test_ctrl_c_leaves_the_job_running(ray: Cluster, place: Path) -> None:
    """Where nobody can be asked."""
    log = place / "followed.log"
    more = words(ray, place, "--submission-id", "left", "--train.max_steps", "60")
    words_of_it = ["launchers.ray_submit", *more, "--output.dir", "runs/left"]
    with ray.running(*words_of_it, log=log) as followed:
        until = time.monotonic() + 120
        while "step 1/60" not in log.read_text():
            assert time.monotonic() < until and followed.poll() is None, log.read_text()
            time.sleep(0.05)
        followed.send_signal(signal.SIGINT)
        assert followed.wait(30) == 130, log.read_text()
    assert "left goes on without this program; ray job logs" in log.read_text()
    ended = subprocess.run(
        [sys.executable, "-c", "import sys\nfrom ray.job_submission import JobSubmissionClient\n"
         "import time\nclient = JobSubmissionClient(sys.argv[1])\n"
         "while not client.get_job_status('left').is_terminal(): time.sleep(0.2)\n"
         "print(client.get_job_status('left').value)", ray.url],
        env=ray.environment, cwd=ROOT, text=True, capture_output=True, timeout=120,
    )  # fmt: skip
    assert ended.stdout.split()[-1] == "SUCCEEDED", ended.stderr


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
        (["--model.path", "tuned"], "model.path: tuned/model.safetensors is left out of what"),
        (["--data.train", "*.pt"], "data.train: a.pt is left out of what is sent"),
        (["--data.train", "mine/a.jsonl"], "data.train: mine/a.jsonl is left out of what"),
        (["--resources", '{"GPU": 1}'], "resources: GPU needs --use-gpu"),
        (["--storage", "x", "--output.remote", "file:///x"], "storage: output.remote is set"),
        (["--num-workers", "2:1"], "num-workers: 2 is more than 1"),
        (["--num-workers", "many"], "num-workers: expected N or MIN:MAX, got 'many'"),
        (["--working-dir", "nowhere"], "working-dir: nowhere is no directory"),
        (["--resources", '{"CPU": 0}'], "resources: must be > 0"),
        (["--check"], "--check belongs to dlora.train"),
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
        main(["--address", "http://127.0.0.1:9", "--config", "run.json", *more])
    assert message in str(refused.value) and "\n" not in str(refused.value)


def test_a_configuration_elsewhere_is_refused(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    with pytest.raises(UsageError, match=r"config: packed/run\.json does not lie in the working"):
        forwarded(["--config", "packed/run.json"], place / "seen")


class Asked:
    """A client of which only the stop is wanted."""

    def __init__(self) -> None:
        self.stopped: list[str] = []

    def stop_job(self, job: str) -> None:
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
