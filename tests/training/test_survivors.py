"""Invariant 6: whoever survives commits the last whole step, and the run goes on from there.

Where ranks die or hang they are processes of their own, started as by hand, without an agent.
"""

import contextlib
import functools
import io
import os
import re
import shutil
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from kill_trials import ADALORA
from ranks import Pools
from run_training import prepared_run, train
from sampling import full
from stopped_runs import after_step, steps_saved
from two_ranks import Ranks, check_same_end

from dlora.base.model import BaseModel
from dlora.checkpoint import format as checkpoints
from dlora.checkpoint.remote import RemoteCheckpoints
from dlora.hooks import Committed, Hooks
from dlora.train import Run, main
from dlora.training import checkpointing
from dlora.training.watchdogs import FiniteWatch

LONG = 300.0  # seconds
STEPS, SAVED, BROKEN = 8, 3, 6  # a checkpoint every 3 steps; something happens in the 6th
# AdaLoRA's last mask falls on step 4: by the 6th the adapters have shrunk.
METHODS: dict[str, dict[str, Any]] = {"lora": {}, "adalora": ADALORA}


def wait_until(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + LONG
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)


# -- in a rank -----------------------------------------------------------------------------------


def struck(at: Any, name: str, number: int, step_of: Callable[..., int]) -> None:
    """This rank gets the signal where it calls `at.name` in the 6th step."""
    whole = getattr(at, name)

    def strike(*args: Any) -> Any:
        if step_of(*args) == BROKEN - 1:
            os.kill(os.getpid(), number)
        return whole(*args)

    setattr(at, name, strike)


def ends_in_a_forward(number: int) -> None:
    """Before the first forward of the 6th step."""
    struck(Run, "sample_keys", number, lambda run, step, batch: step)


def ends_after_a_step(number: int) -> None:
    """After the 5th step, before the step's line is written."""
    struck(FiniteWatch, "see", number, lambda watch, record, *ids: record["step"])


def ends_while_loading(number: int) -> None:
    """Before it reads weights."""
    struck(BaseModel, "load", number, lambda *_: BROKEN - 1)


def hears_nothing(*_: object) -> None:
    """As under NCCL: a collective whose peer is gone waits and waits, and raises nothing."""
    from torch.distributed import distributed_c10d

    distributed_c10d._set_pg_timeout = lambda *_: None  # that of loading, an hour, stays


def stops_silently(number: int) -> None:
    hears_nothing()
    ends_in_a_forward(number)


def sleeps_silently(seconds: float) -> None:
    """This rank's main thread stays in the 6th step; its others live on."""
    hears_nothing()
    whole = Run.sample_keys

    def sleep(run: Any, step: int, batch: Any) -> Any:
        time.sleep(seconds if step == BROKEN - 1 else 0)
        return whole(run, step, batch)

    Run.sample_keys = sleep  # type: ignore[method-assign]


def failing(error: Exception) -> Callable[..., Any]:
    """`Run.sample_keys` that raises in the 6th step."""

    def fail(run: Any, step: int, batch: Any, whole: Any = Run.sample_keys) -> Any:
        if step == BROKEN - 1:
            raise error
        return whole(run, step, batch)

    return fail


def fails_in_a_forward(message: str) -> None:
    Run.sample_keys = failing(ValueError(message))  # type: ignore[method-assign]


# -- around them ---------------------------------------------------------------------------------


@pytest.fixture
def ranks_of(tmp_path: Path) -> Any:
    """ranks_of(argv, rank1=…): `Ranks`, ended with the test."""
    started: list[Ranks] = []

    def start(argv: list[str], **meddling: Any) -> Ranks:
        started.append(Ranks(argv, tmp_path / f"printed-{len(started)}", **meddling))
        return started[-1]

    yield start
    for ranks in started:
        ranks.end()


@pytest.fixture(scope="module")
def command(words: Any) -> Any:
    """command(directory, method, **settings): the words of a run of 8 steps, with dropout."""
    common = {
        "output__save_every": SAVED,
        "train__max_steps": STEPS,
        "adapter__lora_dropout": 0.1,
        "sharding__base": "world",
    }

    def of(directory: Path, method: str = "lora", **settings: Any) -> list[str]:
        return words(directory, **common | METHODS[method] | settings)

    return of


@pytest.fixture(scope="module")
def whole(command: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """whole(engine, method): the directory of an undisturbed run, made once."""

    @functools.cache
    def of(engine: str, method: str) -> Path:
        directory = tmp_path_factory.mktemp("whole")
        Ranks(command(directory / "run", method, sharding__engine=engine), directory).finish()
        return directory / "run"

    return of


@pytest.mark.parametrize(
    ("engine", "method", "victim", "how"),
    [
        ("fsdp2", "lora", 0, ends_after_a_step),
        # 2 s: the other engine's, with what the two before it have
        full("fsdp2", "lora", 1, ends_in_a_forward),
        full("fsdp2", "adalora", 0, ends_in_a_forward),  # 15 s; as in `test_kill_trials.py`
        ("zero3", "lora", 1, ends_in_a_forward),
    ],
)
def test_a_killed_peer(
    tmp_path: Path,
    ranks_of: Any,
    command: Any,
    whole: Any,
    engine: str,
    method: str,
    victim: int,
    how: Any,
) -> None:
    """promises 2.7, 3.2: the survivor commits the step before; nothing else was ever there."""
    argv = command(tmp_path / "run", method, sharding__engine=engine)
    ranks = ranks_of(argv, **{f"rank{victim}": (how, signal.SIGKILL)})
    survivor = 1 - victim
    assert ranks.status(victim) == -signal.SIGKILL, ranks.printed(victim)
    assert ranks.status(survivor) == 1, ranks.printed(survivor)
    saved = tmp_path / "run" / "checkpoints" / f"step-{BROKEN - 1:06d}"
    checkpoints.verify(saved)
    said = [line for line in ranks.printed(survivor).splitlines() if "committed" in line]
    assert len(said) == 1, ranks.printed(survivor)
    for part in (f"rank {survivor}", f"step {BROKEN - 1}", str(saved), "lost a peer", "resumes"):
        assert part in said[0]
    assert "Traceback" not in ranks.printed(survivor)
    resumed = ranks_of(argv)
    resumed.finish()
    assert f"resuming after step {BROKEN - 1}" in resumed.printed(0)
    check_same_end(tmp_path / "run", whole(engine, method), engine)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), full(signal.SIGINT, 130)])
def test_a_hung_peer(ranks_of: Any, command: Any, tmp_path: Path, number: int, status: int) -> None:
    """Blocked in a collective, told to stop: committed and gone within 10 s."""
    ranks = ranks_of(command(tmp_path / "run"), rank0=(ends_in_a_forward, signal.SIGSTOP))
    ranks.wait_until_stopped(0)
    ranks.send(1, number)
    assert ranks.status(1, limit=10) == status, ranks.printed(1)
    saved = tmp_path / "run" / "checkpoints" / f"step-{BROKEN - 1:06d}"
    checkpoints.verify(saved)
    assert f"step {BROKEN - 1} is committed in {saved}" in ranks.printed(1)


@pytest.mark.parametrize(
    ("victim", "how", "said"),
    [
        (1, (stops_silently, signal.SIGSTOP), "rank 1 on .* gives no sign of life"),
        (0, (stops_silently, signal.SIGSTOP), "rank 0, which serves the store, does not answer"),
        (1, (sleeps_silently, LONG), "nothing moved for 8 s; rank 1 on .* is behind the others"),
    ],
)
def test_a_hung_peer_that_nobody_hears_of(
    ranks_of: Any, command: Any, tmp_path: Path, victim: int, how: Any, said: str
) -> None:
    """Nothing is raised, as under NCCL: committed and gone within 10 s of the limit."""
    argv = command(tmp_path / "run", sharding__timeout_seconds=8, train__micro_batch_size=24)
    survivor = 1 - victim
    meddling = {f"rank{victim}": how, f"rank{survivor}": (hears_nothing, 0)}
    ranks = ranks_of(argv, **meddling)
    wait_until(lambda: (tmp_path / "run" / "metrics.jsonl").exists())
    wait_until(lambda: f'"step": {BROKEN - 1}' in (tmp_path / "run/metrics.jsonl").read_text())
    assert ranks.status(survivor, limit=8 + 10) == 1, ranks.printed(survivor)
    saved = tmp_path / "run" / "checkpoints" / f"step-{BROKEN - 1:06d}"
    checkpoints.verify(saved)
    [line] = [line for line in ranks.printed(survivor).splitlines() if "committed" in line]
    assert re.search(f"step {BROKEN - 1} is committed in {saved}; .*lost a peer: .*{said}", line), (
        line
    )


def test_two_ranks_of_a_node_keep_snapshots(ranks_of: Any, command: Any, tmp_path: Path) -> None:
    """The third one knows what the second has committed; every second step is copied."""
    argv = command(tmp_path / "run", output__snapshot_every=2, output__save_every=0)
    ranks = ranks_of(argv, world=3, rank0=(ends_in_a_forward, signal.SIGKILL))
    assert [ranks.status(rank) for rank in range(3)] == [-signal.SIGKILL, 1, 1]
    directory = tmp_path / "run" / "checkpoints"
    assert [path.name for path in directory.iterdir() if path.is_dir()] == ["step-000004"]
    line = f"step 4 is committed in {directory / 'step-000004'}, 1 step before the last whole one;"
    assert f"dlora: rank 1: {line}" in ranks.printed(1)
    assert "dlora: rank 2: snapshots are kept by the first 2 ranks of each node" in ranks.printed(2)
    resumed = ranks_of(argv, world=3)
    resumed.finish()
    assert "resuming after step 4" in resumed.printed(0)


def told_of_the_last_step(argv: list[str], asked: tuple[int, ...], patience: float) -> str:
    """What a rank says of its last whole step, had it lost its peers after the run.

    Args:
        asked: the ranks that know of it; the others say nothing, and commit nothing.
        patience: seconds that those without snapshots wait for one of the others.
    """
    run, seconds = prepared_run(argv), checkpointing.KEEPER_SECONDS
    run.train()
    checkpointing.KEEPER_SECONDS = patience
    try:
        return run.checkpoints.commit_alone(ending=True) if dist.get_rank() in asked else ""
    finally:
        checkpointing.KEEPER_SECONDS = seconds


def committed(step: int, behind: str = "") -> str:
    there = f"step {step} is committed in RUN/checkpoints/step-{step:06d}{behind}"
    return f"{there}; the same command resumes from there"


DIVIDED = "no rank has the whole optimizer state; the newest checkpoint is the last save"
NONE_YET = "no snapshot is whole yet; the newest checkpoint is the last save"
NONE_YET += " (the same command resumes from there)"
OF_OTHERS = "snapshots are kept by the first 2 ranks of each node"
EVERYBODY = (0, 1, 2)


@pytest.mark.parametrize(
    ("settings", "asked", "wanted"),
    [
        (
            {"output__snapshot_every": 3},
            EVERYBODY,
            [committed(6, ", 2 steps before the last whole one")] * 3,
        ),
        (
            {"output__snapshot_every": 7},
            EVERYBODY,
            [committed(7, ", 1 step before the last whole one")] * 3,
        ),
        ({"output__snapshot_every": 4}, EVERYBODY, [committed(8)] * 3),
        ({"output__snapshot_every": 9}, EVERYBODY, [NONE_YET, NONE_YET, OF_OTHERS]),
        ({"output__snapshot_every": 3}, (2,), ["", "", OF_OTHERS]),
        ({"sharding__optimizer_state": "divided"}, EVERYBODY, [DIVIDED] * 3),
    ],
    ids=["2 steps older", "1 step older", "as old", "none yet", "keepers are lost", "divided"],
)
def test_the_third_rank_says_what_the_first_two_have(
    pools: Pools,
    command: Any,
    tmp_path: Path,
    settings: dict[str, Any],
    asked: tuple[int, ...],
    wanted: list[str],
) -> None:
    """It has no snapshots: it waits for one of those that have, as long as there may be one."""
    argv = command(tmp_path / "run", output__save_every=0, **settings)
    patience = 0.5 if OF_OTHERS in wanted else LONG
    found = pools(3).run(told_of_the_last_step, argv, asked, patience)
    for rank, (line, text) in enumerate(zip(found, wanted, strict=True)):
        said = line.replace(str(tmp_path / "run"), "RUN")
        assert said == (f"dlora: rank {rank}: {text}" if text else "")


@pytest.mark.parametrize("victim", [0, 1])
def test_a_peer_that_fails_is_named(
    ranks_of: Any, command: Any, tmp_path: Path, victim: int
) -> None:
    meddling = {f"rank{victim}": (fails_in_a_forward, "no kernel image\nfor this device")}
    ranks = ranks_of(command(tmp_path / "run"), **meddling)
    survivor = 1 - victim
    assert (ranks.status(victim), ranks.status(survivor)) == (1, 1)
    failed = f"rank {victim} on {socket.gethostname()} failed: ValueError: no kernel image"
    assert "ValueError: no kernel image" in ranks.printed(victim)
    [line] = [line for line in ranks.printed(survivor).splitlines() if "committed" in line]
    assert f"(lost a peer: {failed}" in line


def test_a_rank_s_own_fault_commits_its_last_step(
    monkeypatch: pytest.MonkeyPatch, capsys: Any, command: Any, tmp_path: Path
) -> None:
    """What torch raises after a fault of a GPU; ranks commit alone, so that one shows it."""
    fault = "CUDA error: uncorrectable ECC error encountered\nCUDA kernel errors might be reported"
    monkeypatch.setattr(Run, "sample_keys", failing(RuntimeError(fault)))
    with pytest.raises(RuntimeError, match="uncorrectable ECC error"):
        main(command(tmp_path / "run", sharding__base="none", output__save_every=0))
    assert steps_saved(tmp_path / "run") == [f"step-{BROKEN - 1:06d}"]
    saved = tmp_path / "run" / "checkpoints" / f"step-{BROKEN - 1:06d}"
    checkpoints.verify(saved)
    [line] = [line for line in capsys.readouterr().err.splitlines() if "committed" in line]
    assert line.startswith(f"dlora: rank 0: step {BROKEN - 1} is committed in {saved}; ")
    assert "lost a peer" not in line


def test_a_second_signal_ends_a_blocked_rank(ranks_of: Any, command: Any, tmp_path: Path) -> None:
    """Weights are being read, so that there is nothing to commit, and a first one waits."""
    ranks = ranks_of(command(tmp_path / "run"), rank1=(ends_while_loading, signal.SIGSTOP))
    ranks.wait_until_stopped(1)
    for _ in range(2):  # as one: launchers forward what the shell has sent
        ranks.send(0, signal.SIGTERM)
        assert ranks.status(0, limit=3) is None
    time.sleep(3)
    ranks.send(0, signal.SIGTERM)
    assert ranks.status(0, limit=5) == 143


def stopped_by_a_file(argv: list[str], file: str) -> int:
    """A run in whose 4th step the file appears."""
    touch = after_step(4, Path(file).touch)
    return train(argv, touch if dist.get_rank() == 0 else None)["status"]


def test_a_stop_file(pools: Pools, command: Any, tmp_path: Path) -> None:
    file = tmp_path / "stop"
    argv = command(tmp_path / "run", output__stop_file=str(file))
    assert pools(2).run(stopped_by_a_file, argv, str(file)) == [143, 143]
    assert steps_saved(tmp_path / "run")[-1] == "step-000005"
    with pytest.raises(AssertionError, match=r"output\.stop_file: .*stop already exists"):
        pools(2).run(stopped_by_a_file, argv, str(file))
    file.unlink()
    assert pools(2).run(stopped_by_a_file, argv, str(tmp_path / "other")) == [0, 0]


def stopped_by_a_callable(argv: list[str], rank: int) -> tuple[int, str]:
    """A run whose `should_stop` says so on one rank after the 5th step; what it printed."""
    asked = iter(range(1, STEPS + 1))
    hooks = Hooks(should_stop=lambda: next(asked) == 5 and dist.get_rank() == rank)
    run = prepared_run(argv, hooks)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        status = run.train()
    return status, printed.getvalue()


@pytest.mark.parametrize(("rank", "cause"), [(0, "should_stop"), (1, "another rank")])
def test_a_callable_asks_for_a_stop(
    pools: Pools, command: Any, tmp_path: Path, rank: int, cause: str
) -> None:
    argv = command(tmp_path / "run")
    (status, printed), (other, _) = pools(2).run(stopped_by_a_callable, argv, rank)
    assert (status, other) == (143, 143)
    assert f"stopped by {cause} after step 5" in printed
    assert steps_saved(tmp_path / "run")[-1] == "step-000005"


Told = tuple[int, float, str | None, str | None]


def told_of_saves(argv: list[str], asked_at: int, asks: int) -> list[Told]:
    """(step, loss, name, URL) of each save; one is asked for by one rank, the others are due.

    What is committed verifies at that time, on the disk and in the store.
    """
    asked, seen = iter(range(1, STEPS + 1)), []

    def saved(record: Any, committed: Committed) -> None:
        name = url = None
        if (checkpoint := committed()) is not None:
            name, url = checkpoint.directory.name, checkpoint.url
            checkpoints.verify(checkpoint.directory)
            if url is not None:
                checkpoints.verify(Path(url.removeprefix("file://")))
        seen.append((record["step"], record["loss"], name, url))

    hooks = Hooks(
        should_save=lambda: next(asked) == asked_at and dist.get_rank() == asks, saved=saved
    )
    assert prepared_run(argv, hooks).train() == 0
    return seen


# The last store cannot be written.
@pytest.mark.parametrize(("asks", "store"), [(0, None), (1, "store"), (0, "file/store")])
def test_saves_are_told_on_every_rank(
    pools: Pools, command: Any, tmp_path: Path, asks: int, store: str | None
) -> None:
    (tmp_path / "file").touch()
    url = f"file://{tmp_path}/{store}"
    remote = ["--output.remote", url] if store else []
    main, other = pools(2).run(told_of_saves, [*command(tmp_path / "run"), *remote], 4, asks)
    names = {step: f"step-{step:06d}" for step in (3, 4, 6, 8)}
    urls = [f"{url}/{name}" if store == "store" else None for name in names.values()]
    assert [(step, name) for step, _, name, _ in main] == list(names.items())
    assert [told[3] for told in main] == urls
    assert other == [(step, loss, None, None) for step, loss, _, _ in main]


def trained_beside_a_slow_store(argv: list[str]) -> list[str]:
    """A run whose store takes nothing before the run's last steps are saved.

    Returns:
        What the store got, in order.
    """
    root, got = Path(argv[argv.index("--output.dir") + 1], "checkpoints"), list[str]()
    last, pruned = root / f"step-{STEPS:06d}", root / f"step-{STEPS - 2:06d}"
    put = RemoteCheckpoints.put

    def slow(store: RemoteCheckpoints, directory: Path) -> str:
        wait_until(lambda: last.exists() and not pruned.exists())
        got.append(directory.name)
        return put(store, directory)

    RemoteCheckpoints.put = slow  # type: ignore[method-assign]
    try:
        train(argv)
    finally:
        RemoteCheckpoints.put = put  # type: ignore[method-assign]
    return got


def test_a_slow_store_holds_up_no_step(pools: Pools, command: Any, tmp_path: Path) -> None:
    """Steps 1 to 8 are saved; the first is being copied, of the others the last two are."""
    argv = command(tmp_path / "run", output__save_every=1)
    argv += ["--output.remote", f"file://{tmp_path}/store"]
    main, other = pools(2).run(trained_beside_a_slow_store, argv)
    last = [f"step-{step:06d}" for step in (STEPS - 1, STEPS)]
    assert main == ["step-000001", *last, "adapter"] and other == []
    for name in last:
        checkpoints.verify(tmp_path / "store" / name)


def committed_again(argv: list[str], rounds: int) -> list[dict[str, bool]]:
    """A run whose last checkpoint all ranks commit again at one time, from their snapshots.

    Returns:
        For each round, whether each file holds the bytes of the regular save.
    """
    run = prepared_run(argv)
    run.train()
    last = run.directory / "checkpoints" / f"step-{STEPS:06d}"
    kept, results = run.directory / "regular", []
    for _ in range(rounds):
        if dist.get_rank() == 0:
            shutil.rmtree(kept, ignore_errors=True)
            last.rename(kept)
        dist.barrier()
        run.checkpoints.commit(ending=True)
        dist.barrier()
        regular = {path.name: path.read_bytes() for path in kept.iterdir()}
        again = {path.name: path.read_bytes() for path in last.iterdir()}
        results.append({n: regular.get(n) == again.get(n) for n in regular.keys() | again.keys()})
        assert sorted(path.name for path in last.parent.iterdir())[-1] == last.name
        assert not list(last.parent.glob(".*"))
        dist.barrier()
    return results


@pytest.mark.parametrize("method", METHODS)
def test_a_snapshot_s_bytes_are_those_of_a_save(
    pools: Pools, command: Any, tmp_path: Path, method: str
) -> None:
    """Also where all ranks commit the same step at the same moment."""
    files = {*checkpoints.FILES, "manifest.json"} | (
        {"scorer.safetensors"} if method == "adalora" else set()
    )
    for rounds in pools(2).run(committed_again, command(tmp_path, method), 5):
        assert rounds == [dict.fromkeys(files, True)] * 5
