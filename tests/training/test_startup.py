"""Several ranks, one command line: one error line, printed once, and status 2 on all of them.

The processes are started as by hand, without an agent: rank 0 hosts the store.
"""

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from programs import become, free_port
from ranks import Pools, server
from tiny import command

from dlora.errors import TransientError, UsageError
from dlora.runtime.agreement import agree
from dlora.runtime.exit_status import PrintedTransientError, exit_with
from dlora.runtime.ranks import Ranks

ROOT = Path(__file__).parents[2]
LIMIT_SECONDS = 240


def one_rank(
    rank: int,
    world: int,
    port: int,
    argv: list[str],
    printed: str,
    delay: float,
    breaks: bool,
    stays: bool,
) -> None:
    """The life of a rank, after `delay` seconds; where it `breaks`, no weights can be read.

    With `stays` its process goes on after that until all have come so far, as Ray's do; it ends
    with 3 if that takes too long.
    """
    become(rank, world, port, f"{printed}-1", f"{printed}-2")
    time.sleep(delay)
    from dlora.base.model import BaseModel
    from dlora.train import main

    def load(*_: Any) -> None:
        raise UsageError("model.path: was taken away meanwhile") from OSError("as a hub's is")

    if breaks:
        BaseModel.load = load  # type: ignore[method-assign, assignment]

    sys.argv = ["dlora.train", *argv]
    if not stays:
        exit_with(main)
    try:
        status = main(argv)
    except UsageError:
        status = 2
    Path(f"{printed}-ended").touch()
    ended = [Path(printed).with_name(f"{other}-ended") for other in range(world)]
    until = time.monotonic() + LIMIT_SECONDS / 2
    while not all(path.exists() for path in ended):
        if time.monotonic() > until:
            raise SystemExit(3)
        time.sleep(0.1)
    raise SystemExit(status)


def by_hand(
    directory: Path,
    *argv: list[str],
    world: int = 2,
    delays: tuple[float, ...] = (0, 0, 0, 0),
    breaks: tuple[int, ...] = (),
    stays: bool = False,
) -> list[tuple[int, str, str]]:
    """(status, standard output, standard error) by rank; one command line, or one for each."""
    port = free_port()
    context = server()
    workers: list[Any] = []
    for rank in range(world):
        arguments = (rank, world, port, argv[rank % len(argv)], str(directory / str(rank)))
        how = delays[rank], rank in breaks, stays
        workers.append(context.Process(target=one_rank, args=(*arguments, *how), daemon=True))
        workers[-1].start()
    deadline = time.monotonic() + LIMIT_SECONDS
    for worker in workers:
        worker.join(max(0.0, deadline - time.monotonic()))
        if worker.is_alive():
            worker.kill()
            worker.join()
    texts = [[(directory / f"{rank}-{d}").read_text() for d in (1, 2)] for rank in range(world)]
    return [(w.exitcode, *text) for w, text in zip(workers, texts, strict=True)]


@pytest.mark.parametrize("delays", [(1.5, 0), (0, 1.5)])
def test_a_wrong_key_is_said_once(
    saved_models: Any, tmp_path: Path, delays: tuple[float, float]
) -> None:
    """Whoever comes late: rank 0 speaks before the other leaves, and the store outlives it."""
    argv = [*command(saved_models("llama"), tmp_path), "--train.max_step", "3"]
    first, second = by_hand(tmp_path, argv, delays=delays)
    said = "dlora: error: --train.max_step is not an option (did you mean --train.max_steps?)\n"
    assert first == (2, "", said)
    assert second == (2, "", "")


def test_a_file_that_is_wrong_on_one_rank(saved_models: Any, tmp_path: Path) -> None:
    right = command(saved_models("llama"), tmp_path)
    (tmp_path / "wrong.yaml").write_text("optimizer: {lr: fast}\n")
    wrong = [*right, "--config", str(tmp_path / "wrong.yaml")]
    first, second = by_hand(tmp_path, right, wrong)
    assert (first[0], second) == (2, (2, "", ""))
    assert first[2].startswith("dlora: error: rank 1: ") and "optimizer.lr" in first[2]
    assert len(first[2].splitlines()) == 1


def test_wrong_data(saved_models: Any, tmp_path: Path) -> None:
    argv = command(saved_models("llama"), tmp_path, data__train=str(tmp_path / "gone.jsonl"))
    first, second = by_hand(tmp_path, argv)
    assert (first[0], second[0], second[2]) == (2, 2, "")
    assert "gone.jsonl does not exist" in first[2] and len(first[2].splitlines()) == 1


@pytest.mark.parametrize("switch", ["--print_config", "--help", "--check"])
def test_what_is_only_printed_is_printed_once(
    saved_models: Any, tmp_path: Path, switch: str
) -> None:
    argv = [*command(saved_models("llama"), tmp_path), switch]
    first, second = by_hand(tmp_path, argv, delays=(0, 1.0))
    assert (first[0], first[2]) == (0, "")
    assert second == (0, "", "")
    wanted = {"--print_config": "\nadapter:\n", "--help": "usage: ", "--check": "(--check)\n"}
    assert first[1].count(wanted[switch]) == 1


def test_what_goes_wrong_later_is_said_once_too(saved_models: Any, tmp_path: Path) -> None:
    """By whichever rank meets it first."""
    ranks = by_hand(tmp_path, command(saved_models("llama"), tmp_path), breaks=(0, 1))
    assert [status for status, _, _ in ranks] == [2, 2]
    (said,) = "".join(errors for _, _, errors in ranks).splitlines()
    assert said.startswith("dlora: error: ") and said.endswith("was taken away meanwhile")


@pytest.mark.parametrize(("world", "broken"), [(2, 0), (2, 1), (4, 2)])
def test_what_one_rank_meets_alone_ends_the_others_too(
    saved_models: Any, tmp_path: Path, world: int, broken: int
) -> None:
    """Whose collectives, and whose waits in the store, would wait for it: its process lives on."""
    argv = command(saved_models("llama"), tmp_path)
    ranks = by_hand(tmp_path, argv, world=world, breaks=(broken,), stays=True)
    assert [status for status, _, _ in ranks] == [2] * world, ranks
    lines = "".join(errors for _, _, errors in ranks).splitlines()
    (said,) = [line for line in lines if not line.startswith("[rank")]  # torch's, of a wait
    assert said.startswith("dlora: error: " + (f"rank {broken}: " if broken else "model.path: "))
    assert said.endswith("was taken away meanwhile")


def test_the_agent_does_not_silence_a_slow_rank_0(saved_models: Any, tmp_path: Path) -> None:
    """It ends all ranks as soon as one has ended."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, time\nif os.environ.get('RANK') == '0': time.sleep(3)\n"
    )
    argv = [*command(saved_models("llama"), tmp_path), "--train.max_step", "3"]
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-m", "dlora.launch", "--nproc-per-node", "2", *argv],
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=LIMIT_SECONDS,
    )
    assert done.returncode == 2
    assert done.stderr.count("dlora: error: --train.max_step is not an option") == 1


def test_a_peer_that_is_not_reached_is_no_mistake_of_the_user_s(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Launchers do not try 2 again."""

    def main(argv: list[str]) -> int:
        raise TransientError("no sign of rank 1")

    with pytest.raises(SystemExit) as ended:
        exit_with(main)
    assert ended.value.code == 1
    assert capsys.readouterr().err == "dlora: error: no sign of rank 1\n"


def test_what_may_pass_is_known_as_such_on_every_rank(capsys: pytest.CaptureFixture[str]) -> None:
    """As a store that does not answer rank 0, which alone asks it."""
    store = dist.HashStore()

    def work() -> tuple[None, str]:
        raise TransientError("the store does not answer")

    def rank(number: int) -> Exception | None:
        runtime = Ranks(number, 2, torch.device("cpu"), store)
        try:
            agree(runtime, "start", work if number == 0 else lambda: (None, ""))
        except Exception as error:
            return error
        return None

    with ThreadPoolExecutor(2) as ranks:
        found = list(ranks.map(rank, range(2)))
    assert [type(error) for error in found] == [PrintedTransientError] * 2
    assert capsys.readouterr().err == "dlora: error: the store does not answer\n"


def test_a_rank_that_does_not_come_is_named_with_its_host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It said where it runs, prepared the run, and was gone before the process group."""
    monkeypatch.setattr("dlora.runtime.ranks.JOINING_SECONDS", 0.5)
    store = dist.PrefixStore("dlora", dist.FileStore(str(tmp_path / "store"), 3))
    store.set("host/1", "node-b")
    runtime = Ranks(0, 3, torch.device("cpu"), store)
    with pytest.raises(TransientError) as caught:
        runtime.join()
    said = str(caught.value)
    assert said.startswith("rank 1 on node-b, rank 2 on an unknown host did not join within 0.5 s;")
    assert not dist.is_initialized()


def entered(port: int, argv: list[str]) -> str:
    """What is said on this rank where rank 1 is in the wrong place."""
    from dlora.training.startup import enter

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))

    def first() -> None:
        if os.environ["RANK"] == "1":
            raise UsageError("/work does not exist on node1")

    try:
        enter(argv, "dlora.train", first)
    except UsageError as error:
        return str(error)
    return "entered"


def test_a_rank_in_the_wrong_place_ends_all(
    pools: Pools, saved_models: Any, tmp_path: Path
) -> None:
    """Before it reads its command line; Ray's launcher asks so for the directory of the run."""
    argv = command(saved_models("llama"), tmp_path)
    said = pools(2).run(entered, free_port(), argv)
    assert said == ["rank 1: /work does not exist on node1"] * 2
