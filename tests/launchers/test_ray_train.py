"""dlora under Ray Train on two raylets: the run that torchrun makes, whatever is lost meanwhile."""

import contextlib
import json
import re
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from ranks import Pools
from ray_cluster import Cluster, cluster, ended, starts_in
from run_files import write_run
from run_training import train
from safetensors.torch import load_file
from tiny import save_chats, save_model

from dlora.checkpoint import format as checkpoints
from dlora.config.load import parse
from launchers.ray_train import Workers, placed, trainer

STEPS, LIMIT_SECONDS = 60, 400
SILENCE_SECONDS = 20  # after half of which a rank that gives no sign of life is lost
BY_NODE = {"sharding__base": "node"}
Configured = Callable[..., Path]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a model and data, for the runs of this file."""
    root = tmp_path_factory.mktemp("place")
    save_model(root / "model", "llama", torch.float32)
    save_chats(root / "chats.jsonl", 24)
    return root


@pytest.fixture(scope="module")
def configured(place: Path) -> Configured:
    """configured(name, **settings): the file of a run whose `output.dir` is `place/name`."""

    def write(name: str, **settings: Any) -> Path:
        common = {
            "model__path": str(place / "model"),
            "data__train": str(place / "chats.jsonl"),
            "sharding__base": "world",
            "train__max_steps": STEPS,
            "output__save_every": 4,
            "output__dir": str(place / name),
        }
        return write_run(place / f"{name}.json", **common | settings)

    return write


@pytest.fixture(scope="module")
def without_ray(pools: Pools, configured: Configured, place: Path) -> Path:
    """The directory of the run that two ranks make by themselves."""
    pools(2).run(train, ["--config", str(configured("without_ray"))])
    return place / "without_ray"


def lines(directory: Path) -> list[dict[str, Any]]:
    path = directory / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def check_same(directory: Path, other: Path) -> None:
    """Each step once, of the same sequences; and A and B to 1e-5."""
    ours, theirs = lines(directory), lines(other)
    assert [line["step"] for line in ours] == list(range(1, STEPS + 1))
    assert [line["batch_hash"] for line in ours] == [line["batch_hash"] for line in theirs]
    adapters = [load_file(d / "adapter/adapter_model.safetensors") for d in (directory, other)]
    assert adapters[0].keys() == adapters[1].keys()
    for name, tensor in adapters[0].items():
        wanted = adapters[1][name]
        assert (tensor - wanted).norm() <= 1e-5 * wanted.norm(), name


def check_told(stored: Path, directory: Path) -> None:
    """What Ray knows of a run: a line of the metrics, and where each checkpoint is that is left."""
    from ray.train import Result

    result = Result.from_path(str(stored))
    last = lines(directory)[-1]
    assert result.metrics["step"] == STEPS and result.metrics["loss"] == last["loss"]
    pointers = [
        json.loads(Path(checkpoint.path, "checkpoint.json").read_text())
        for checkpoint, _ in result.best_checkpoints
    ]
    assert [pointer["step"] for pointer in pointers] == [STEPS - 4, STEPS]
    for pointer in pointers:
        assert pointer["uri"] == f"file://{stored}/step-{pointer['step']:06d}"
        checkpoints.verify(Path(pointer["uri"].removeprefix("file://")))


def wait_for(condition: Callable[[], bool], limit: float = LIMIT_SECONDS) -> None:
    until = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


def last_step(directory: Path) -> int:
    return max((line["step"] for line in lines(directory)), default=0)


@pytest.mark.full  # 40 s: four ranks; a submitted run of two is compared alike
def test_it_is_the_run_without_ray(
    ray: Cluster, configured: Configured, place: Path, pools: Pools
) -> None:
    """Two ranks on each of two raylets: W0 is sharded over a node of Ray's, and what is sent, what
    is learnt and what is written are what four ranks on two nodes make by themselves."""
    pools(4).run(train, ["--config", str(configured("nodes", **BY_NODE))], ranks_per_node=2)
    command = ["launchers.ray_train", "--config", str(configured("whole", **BY_NODE))]
    made = ray.run(*command, "--num-workers", "4", "--resources", '{"CPU": 0.5}')
    printed = made.stdout + made.stderr
    assert made.returncode == 0, printed
    assert len(set(re.findall(r"ip=(\S+), pid=\d+\) world_rank", printed))) == 2
    assert "base: node, engine: fsdp2, 4 rank(s)" in printed
    check_same(place / "whole", place / "nodes")
    for ours, theirs in zip(lines(place / "whole"), lines(place / "nodes"), strict=True):
        assert ours["wire_bytes"] == theirs["wire_bytes"]
    stored = place / "whole" / "ray"
    assert sorted(p.name for p in stored.glob("step-*")) == ["step-000056", "step-000060"]
    for file in (place / "whole/adapter").iterdir():
        assert (stored / "adapter" / file.name).read_bytes() == file.read_bytes()
    check_told(stored, place / "whole")


@pytest.mark.full  # 25 s each; the run that outlives everything is stopped as well
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stop_by_signal_commits(
    ray: Cluster, configured: Configured, place: Path, number: int, status: int
) -> None:
    name = f"stopped-{status}"
    config = configured(name, train__max_steps=100_000, output__save_every=0)
    log, directory = place / f"{name}.log", place / name
    command = ["launchers.ray_train", "--config", str(config), "--num-workers", "2"]
    with ray.running(*command, log=log) as job:
        wait_for(lambda: last_step(directory) >= 3)
        job.send_signal(number)
        assert ended(job, log) == status, log.read_text()
    saved = directory / f"ray/step-{last_step(directory):06d}"
    checkpoints.verify(saved)
    assert starts_in(log.read_text()) == 1


@pytest.mark.full  # 20 s: a driver of its own
def test_a_run_that_waits_for_room_is_stopped_at_once(
    ray: Cluster, configured: Configured, place: Path
) -> None:
    """No rank will ever ask for the flag."""
    log = place / "waiting.log"
    command = ["launchers.ray_train", "--config", str(configured("waiting")), "--num-workers", "3"]
    with ray.running(*command, log=log) as job:
        wait_for(lambda: "Attempting to start training worker group" in log.read_text())
        job.send_signal(signal.SIGTERM)
        assert ended(job, log) == 143, log.read_text()
    assert starts_in(log.read_text()) == 0


SIGNALLED = """
import os, signal, sys, time
import ray
from launchers import ray_stop

stop = ray_stop.Stop()
ray.get(stop.flag.forget.remote())  # it is there: what comes at once to an actor has no order
asked = stop.flag.get.remote()
assert ray.wait([asked], timeout=2) == ([], [asked])
if sys.argv[1] == "lost":
    ray_stop.Forgetting(stop.flag).after_exception(None, {0: RuntimeError("a peer was lost")})
    ray.get(stop.flag.forget.remote())
os.kill(os.getpid(), signal.SIGTERM)
print("heard", ray.get(asked, timeout=30))
"""


@pytest.mark.parametrize(
    ("ranks", "status", "printed"),
    [
        pytest.param(
            *("there", 0),
            "stopping after this step; a second signal ends the run at once\nheard 15\n",
            marks=pytest.mark.full,  # as a run that is stopped shows
        ),
        ("lost", 143, ""),
    ],
)
def test_a_signal_reaches_ranks_that_are_there(
    ray: Cluster, ranks: str, status: int, printed: str
) -> None:
    """At once, and where Ray has lost them the program itself."""
    made = ray.python("-c", SIGNALLED, ranks)
    assert made.returncode == status, made.stderr
    assert made.stdout == printed


@pytest.mark.full  # 40 s: two starts of Ray Train
def test_the_same_command_goes_on_after_pruning(
    ray: Cluster, configured: Configured, place: Path
) -> None:
    """And a stop file ends it with 143, which Ray does not answer with another start."""
    settings = {"optimizer__schedule": "constant", "output__save_every": 1}
    command = ["launchers.ray_train", "--num-workers", "1", "--config"]
    first = ray.run(*command, str(configured("again", train__max_steps=4, **settings)))
    assert first.returncode == 0, first.stdout + first.stderr
    stop, log = place / "stop", place / "again.log"
    more = {"train__max_steps": 100_000, "output__stop_file": str(stop), "output__save_every": 0}
    with ray.running(*command, str(configured("again", **settings | more)), log=log) as job:
        wait_for(lambda: last_step(place / "again") >= 6)
        stop.touch()
        assert ended(job, log) == 143, log.read_text()
    assert "resuming after step 4" in log.read_text() and starts_in(log.read_text()) == 1


@pytest.mark.full  # 75 s
def test_a_worker_that_hangs_is_named(ray: Cluster, configured: Configured, place: Path) -> None:
    """It is stopped, and Ray hears of nothing: the other one commits within 10 s of the limit."""
    endless = {"train__max_steps": 100_000, "optimizer__schedule": "constant"}
    settings = endless | {"output__save_every": 0, "sharding__timeout_seconds": SILENCE_SECONDS}
    log, directory = place / "hung.log", place / "hung"
    command = ["launchers.ray_train", "--config", str(configured("hung", **settings))]
    command += ["--num-workers", "2", "--max-failures", "0"]
    with ray.running(*command, log=log) as job:
        wait_for(lambda: last_step(directory) >= 3)
        [pid] = set(re.findall(r"pid=(\d+)\) world_rank=1", log.read_text()))
        hung = psutil.Process(int(pid))
        hung.suspend()
        try:
            saved = directory / "checkpoints"
            wait_for(lambda: list(saved.glob("step-*")) != [], SILENCE_SECONDS + 10)
            assert ended(job, log) == 1, log.read_text()
        finally:
            with contextlib.suppress(psutil.NoSuchProcess):
                hung.kill()
    saved /= f"step-{last_step(directory):06d}"
    checkpoints.verify(saved)
    line = f"dlora: rank 0: step {last_step(directory)} is committed in {saved}; the same command"
    line += " resumes from there (lost a peer: rank 1 on HOST gives no sign of life)"
    assert line.replace("HOST", socket.gethostname()) in log.read_text()
    assert "dlora: error: Ray gave up the run: " in log.read_text()


def test_a_run_outlives_what_happens_to_it(
    ray: Cluster, configured: Configured, place: Path, without_ray: Path
) -> None:
    """A worker is killed, a node is lost, the run is stopped and started again; in the end it is
    the run that nothing happened to.

    And what Ray's storage refuses meanwhile, as where a node does not see it, ends nothing.
    """
    away, kept, directory = place / "away", place / "kept/outlived", place / "outlived"
    config = configured("outlived", output__remote=f"file://{away}")
    command = ["launchers.ray_train", "--config", str(config), "--num-workers", "1:2"]
    command += ["--storage", str(kept.parent)]
    log = place / "killed.log"

    def goes_on(starts: int) -> bool:
        """Whether ranks that were started again have made a step beyond where they began."""
        told = re.findall(r"pid=(\d+)[^)]*\).*resuming after step (\d+)", log.read_text())
        resumed = dict(told)  # by process; both raylets tell of it
        return len(resumed) >= starts and last_step(directory) > int(told[-1][1])

    with ray.running(*command, log=log) as job:
        wait_for(lambda: list(kept.glob("checkpoint_*/checkpoint.json")) != [])
        (kept / ".validate_storage_marker").unlink()
        [victim] = ray.workers(node=1)
        assert victim.nice() == psutil.Process().nice()  # as torchrun would start it
        wait_for(lambda: last_step(directory) >= 5)
        victim.kill()
        wait_for(lambda: goes_on(1))
        ray.kill_second()
        wait_for(lambda: goes_on(2))
        job.send_signal(signal.SIGTERM)
        assert ended(job, log) == 143, log.read_text()
    assert starts_in(log.read_text()) == 3
    assert "2 rank(s)" in log.read_text() and "1 rank(s)" in log.read_text()
    assert re.search("dlora: warning: step .* could not be reported to Ray", log.read_text())
    stopped = last_step(directory)
    checkpoints.verify(away / f"step-{stopped:06d}")

    log = place / "again.log"
    with ray.running(*command, log=log) as job:
        assert ended(job, log) == 0, log.read_text()
    assert f"resuming after step {stopped}" in log.read_text()
    checkpoints.verify(away / f"step-{STEPS:06d}")
    assert not list(kept.glob("step-*"))
    check_same(directory, without_ray)


@pytest.mark.parametrize("gpus", [False, True])
def test_a_worker_sees_gpus_only_if_asked_for(configured: Configured, gpus: bool) -> None:
    """Ray takes none away, so ranks would use those of others, or one that is not there."""
    config = parse(["--config", str(configured("gpus"))], "dlora.train").config
    workers = Workers(num_workers="2", use_gpu=gpus)
    config, where = placed(config, workers)
    made = trainer(config, workers, where, Path.cwd())
    given = made.run_config.worker_runtime_env["env_vars"].get("CUDA_VISIBLE_DEVICES")
    assert given == (None if gpus else "")
    assert made.scaling_config.use_gpu is gpus


@pytest.mark.full  # a Ray of its own, which loses a node
def test_a_node_with_notice_is_saved_for(configured: Configured, place: Path) -> None:
    """No save is due: the one that comes answers the notice, and the run goes on from there.

    What those who lose the node say of it is no failure, of which there may be none.
    """
    config = configured("noticed", train__max_steps=100_000, output__save_every=100_000)
    log, directory = place / "noticed.log", place / "noticed"
    command = ["launchers.ray_train", "--config", str(config), "--num-workers", "1:2"]
    command += ["--max-failures", "0"]
    with cluster() as ray, ray.running(*command, log=log) as job:
        wait_for(lambda: last_step(directory) >= 3)
        ray.give_notice_to_second(seconds=30)
        noticed = time.monotonic()
        wait_for(lambda: bool(list(directory.glob("ray/step-*/manifest.json"))))
        [saved] = (int(p.name.removeprefix("step-")) for p in directory.glob("ray/step-*"))
        wait_for(lambda: time.monotonic() > noticed + 31)
        ray.kill_second()
        wait_for(lambda: "resuming after step" in log.read_text())
        resumed = re.findall(r"resuming after step (\d+)", log.read_text())
        assert int(resumed[0]) >= saved  # a survivor may have committed a later one
        wait_for(lambda: last_step(directory) > int(resumed[0]))
        assert job.poll() is None


@pytest.mark.full  # Ray looks for nodes once a minute
def test_a_node_that_comes_is_used(configured: Configured, place: Path) -> None:
    config = configured("grown", train__max_steps=100_000, output__save_every=20)
    log, directory = place / "grown.log", place / "grown"
    command = ["launchers.ray_train", "--config", str(config), "--num-workers", "1:2"]
    with cluster(nodes=1) as ray, ray.running(*command, log=log) as job:
        wait_for(lambda: last_step(directory) >= 20)
        assert "1 rank(s)" in log.read_text() and "2 rank(s)" not in log.read_text()
        ray.add_second()
        wait_for(lambda: "resuming after step" in log.read_text())
        resumed = int(re.findall(r"resuming after step (\d+)", log.read_text())[0])
        assert resumed >= 20 and resumed % 20 == 0
        wait_for(lambda: "2 rank(s)" in log.read_text() and last_step(directory) > resumed)
        assert job.poll() is None
    steps = [line["step"] for line in lines(directory)]
    assert steps == list(range(1, len(steps) + 1))
