"""Invariant 5: a run that was interrupted and resumed is the run that was not."""

import contextlib
import functools
import io
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from ranks import Pools
from run_training import figures, relative_error, same_bits, train

from dlora.base.model import BaseModel

STEPS, SAVED = 8, 3  # a checkpoint every 3 steps
CRASHED, SIGNALLED = 6, 4  # while in these steps


class Crash(Exception):  # noqa: N818
    """What ends a run in the middle."""


def after_step(number: int, act: Callable[[], None]) -> Callable[[Any], None]:
    """Meddles with a run: `act` as soon as its optimizer has made its `number`th step."""

    def meddle(run: Any) -> None:
        made = iter(range(1, STEPS + 1))

        def count(*_: Any) -> None:
            if next(made) == number:
                act()

        run.optimizer.register_step_post_hook(count)

    return meddle


def crash() -> None:
    raise Crash


def crashed(argv: list[str], steps: int = CRASHED) -> str:
    """A run that dies in its `steps`th step, past its last checkpoint."""
    try:
        train(argv, after_step(steps, crash))
    except Crash:
        return "crashed"
    return "finished"


def terminated(argv: list[str]) -> dict[str, Any]:
    """A run of which the last rank alone gets SIGTERM, in its step SIGNALLED."""
    last = dist.get_rank() == dist.get_world_size() - 1
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    try:
        kill = after_step(SIGNALLED, lambda: os.kill(os.getpid(), signal.SIGTERM))
        return train(argv, kill if last else None)
    finally:
        signal.signal(signal.SIGTERM, before[0])
        signal.signal(signal.SIGINT, before[1])


def terminated_while_loading(argv: list[str]) -> dict[str, Any]:
    """A run of which the last rank gets SIGTERM while it reads weights."""
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    load = BaseModel.load

    def signalled(*args: Any) -> Any:
        if dist.get_rank() == dist.get_world_size() - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return load(*args)

    BaseModel.load = signalled  # type: ignore[method-assign]
    try:
        return train(argv)
    finally:
        BaseModel.load = load  # type: ignore[method-assign]
        signal.signal(signal.SIGTERM, before[0])
        signal.signal(signal.SIGINT, before[1])


def told(argv: list[str]) -> tuple[dict[str, Any], str]:
    """A run, and what it printed."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        return train(argv), printed.getvalue()


@pytest.fixture(scope="module")
def command(words: Any) -> Any:
    """command(directory, **settings): the words of a run of 8 steps, with dropout."""
    common = {"output__save_every": SAVED, "train__max_steps": STEPS}
    return functools.partial(words, adapter__lora_dropout=0.1, **common)


@pytest.fixture(scope="module")
def whole(pools: Pools, command: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The uninterrupted run on 2 ranks: (its result, its metrics)."""
    directory = tmp_path_factory.mktemp("whole")
    results = pools(2).run(train, command(directory))
    return results[0], figures(directory)


@pytest.fixture(scope="module")
def interrupted(pools: Pools, command: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run on 2 ranks that crashed."""
    directory = tmp_path_factory.mktemp("interrupted")
    assert pools(2).run(crashed, command(directory)) == ["crashed"] * 2
    assert [line["step"] for line in figures(directory)] == list(range(1, CRASHED))
    assert steps_saved(directory) == ["step-000003"]
    return directory


def steps_saved(directory: Path) -> list[str]:
    return sorted(path.name for path in (directory / "checkpoints").glob("step-*"))


def check_equal(result: dict[str, Any], metrics: list[Any], whole: Any) -> None:
    """Bit for bit, and every step stands in the metrics once."""
    wanted, wanted_metrics = whole
    assert result["status"] == 0
    assert same_bits(result["tensors"], wanted["tensors"])
    assert same_bits(result["optimizer"], wanted["optimizer"])
    assert metrics == wanted_metrics


def test_a_crash(pools: Pools, command: Any, whole: Any, interrupted: Path, tmp_path: Path) -> None:
    """promise 3.2: a resumed run is the uninterrupted one."""
    directory = shutil.copytree(interrupted, tmp_path / "run")
    with open(directory / "metrics.jsonl", "a") as metrics:
        metrics.write('{"step": 6, "lo')  # the line that was being written
    for result in pools(2).run(train, command(directory)):
        check_equal(result, figures(directory), whole)
    assert steps_saved(directory) == ["step-000006", "step-000008"]


def test_sigterm_on_one_rank(pools: Pools, command: Any, whole: Any, tmp_path: Path) -> None:
    stopped = pools(2).run(terminated, command(tmp_path))
    assert [result["status"] for result in stopped] == [143, 143]
    # All ranks learn of the signal with the gradients of the next step.
    assert steps_saved(tmp_path) == ["step-000003", "step-000005"]
    for result in pools(2).run(train, command(tmp_path)):
        check_equal(result, figures(tmp_path), whole)


def test_sigterm_while_weights_are_read(
    pools: Pools, command: Any, whole: Any, tmp_path: Path
) -> None:
    stopped = pools(2).run(terminated_while_loading, command(tmp_path))
    assert [result["status"] for result in stopped] == [143, 143]
    assert steps_saved(tmp_path) == ["step-000001"]
    for result in pools(2).run(train, command(tmp_path)):
        check_equal(result, figures(tmp_path), whole)


@pytest.mark.parametrize(
    ("world", "per_node", "base"), [(1, 1, "world"), (3, 3, "world"), (4, 2, "node")]
)
def test_another_world_size(
    pools: Pools,
    command: Any,
    whole: Any,
    interrupted: Path,
    tmp_path: Path,
    world: int,
    per_node: int,
    base: str,
) -> None:
    """promise 3.3: checkpoints know no world size."""
    directory = shutil.copytree(interrupted, tmp_path / "run")
    argv = command(directory, sharding__base=base, train__micro_batch_size=3)
    results = pools(world).run(train, argv, ranks_per_node=per_node)
    wanted, wanted_metrics = whole
    for result in results:
        assert same_bits(result["tensors"], results[0]["tensors"])
        for name, tensor in wanted["tensors"].items():
            assert relative_error(result["tensors"][name], tensor) < 1e-4, name
    metrics = figures(directory)
    assert metrics[:SAVED] == wanted_metrics[:SAVED]
    check_near(metrics, wanted_metrics)


def check_near(metrics: list[Any], wanted: list[Any]) -> None:
    for got, expected in zip(metrics, wanted, strict=True):
        assert got["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert got["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5)
        assert got["batch_hash"] == expected["batch_hash"]


def test_a_checkpoint_moves_between_engines(
    pools: Pools, command: Any, whole: Any, tmp_path: Path
) -> None:
    """From fsdp2 on 2 ranks to zero3 on 3, to one process, to zero3 on 2 nodes of 2, and back."""

    def argv(**sharding: Any) -> list[str]:
        settings = {f"sharding__{key}": value for key, value in sharding.items()}
        return command(tmp_path, output__save_every=1, **settings)

    fsdp2, zero3 = argv(engine="fsdp2", base="world"), argv(engine="zero3", base="world")
    assert pools(2).run(crashed, fsdp2, 3)[0] == "crashed"
    assert pools(3).run(crashed, zero3, 2)[0] == "crashed"
    assert pools(1).run(crashed, argv(base="none"), 2)[0] == "crashed"
    node = argv(engine="zero3", base="node")
    assert pools(4).run(crashed, node, 2, ranks_per_node=2)[0] == "crashed"
    results = pools(2).run(train, fsdp2)
    wanted, wanted_metrics = whole
    assert [line["step"] for line in figures(tmp_path)] == list(range(1, STEPS + 1))
    check_near(figures(tmp_path), wanted_metrics)
    for result in results:
        assert same_bits(result["tensors"], results[0]["tensors"])
        for name, tensor in wanted["tensors"].items():
            assert relative_error(result["tensors"][name], tensor) < 1e-4, name


def test_zero3_resumes_bit_for_bit(pools: Pools, command: Any, tmp_path: Path) -> None:
    where = {"sharding__engine": "zero3", "sharding__base": "world"}
    [wanted, _] = pools(2).run(train, command(tmp_path / "whole", **where))
    assert pools(2).run(crashed, command(tmp_path / "run", **where)) == ["crashed"] * 2
    results = pools(2).run(train, command(tmp_path / "run", **where))
    metrics, wanted_metrics = figures(tmp_path / "run"), figures(tmp_path / "whole")
    for line in (*metrics, *wanted_metrics):
        del line["wire_bytes"]  # more in a process's first steps, until DeepSpeed has its trace
    for result in results:
        check_equal(result, metrics, (wanted, wanted_metrics))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-8])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "file", "warning"),
    [
        (truncate, "optimizer.safetensors", "is missing or has the wrong size"),
        (flip, "adapter.safetensors", "does not match its SHA-256"),
        (Path.unlink, "state.json", "is missing or has the wrong size"),
        (truncate, "manifest.json", "cannot be read"),
    ],
)
def test_a_damaged_newest_checkpoint_is_skipped(
    pools: Pools,
    command: Any,
    whole: Any,
    tmp_path: Path,
    interrupted: Path,
    damage: Callable[[Path], None],
    file: str,
    warning: str,
) -> None:
    directory = shutil.copytree(interrupted, tmp_path / "run")
    newest = shutil.copytree(
        directory / "checkpoints/step-000003", directory / "checkpoints/step-000004"
    )
    damage(newest / file)
    for left in (".step-000005.1-77.tmp", ".step-000004.0-78.old"):  # by a crash during a save
        shutil.copytree(newest, directory / "checkpoints" / left)
    results = pools(2).run(told, command(directory))
    for result, _ in results:
        check_equal(result, figures(directory), whole)
    lines = [line for line in results[0][1].splitlines() if "skipping" in line]
    assert len(lines) == 1 and str(newest / file) in lines[0] and warning in lines[0]
    assert "resuming after step 3" in results[0][1]
    assert results[1][1] == ""
    assert not list((directory / "checkpoints").glob(".step-*"))


def test_a_finished_run_is_left_alone(pools: Pools, command: Any, tmp_path: Path) -> None:
    argv = command(tmp_path, train__max_steps=2)
    pools(2).run(train, argv)
    metrics = (tmp_path / "metrics.jsonl").read_bytes()
    [(result, printed), _] = pools(2).run(told, argv)
    assert result["status"] == 0
    assert "the run is already finished" in printed
    assert (tmp_path / "metrics.jsonl").read_bytes() == metrics
