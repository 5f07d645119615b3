"""A disk that refuses a save: the run goes on, says so at once, and saves when it can again."""

import contextlib
import functools
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Pools
from run_training import figures, prepared_run, train

from dlora.checkpoint import format as checkpoint
from dlora.checkpoint import writing

STEPS = 6


@pytest.fixture
def command(words: Any) -> Any:
    return functools.partial(words, model="blocks", output__save_every=1, train__max_steps=STEPS)


def hindered(argv: list[str], kind: str) -> dict[str, Any]:
    """A run that cannot write in its directory from the save of its 2nd step to its 5th step."""
    run = prepared_run(argv)
    out = run.directory
    see, write = run.losses.see, writing.write_atomically

    def seen(record: dict[str, Any], ids: Any) -> str | None:
        if run.ranks.main and record["step"] == 5:
            _help(out, kind)
        return see(record, ids)

    def written(path: Path, content: bytes) -> None:
        if path.name == "state.json" and ".step-000002." in path.parent.name:
            _hinder(out, kind)
        write(path, content)

    run.losses.see = seen  # type: ignore[method-assign]
    writing.write_atomically = written
    try:
        status = run.train()
    finally:
        writing.write_atomically = write
    return {"status": status, "values": run.replica.values.clone()}


def _hinder(out: Path, kind: str) -> None:
    if kind == "full":
        with contextlib.suppress(OSError), open(out / "filler", "wb") as file:
            while True:
                file.write(b"\0" * 4096)
                file.flush()
    else:  # the directory is gone, and a file has its name
        os.rename(out, out.with_name("away"))
        out.write_text("")


def _help(out: Path, kind: str) -> None:
    if kind == "full":
        (out / "filler").unlink()
    else:
        out.unlink()
        os.rename(out.with_name("away"), out)


@contextlib.contextmanager
def small_disk(path: Path) -> Iterator[Path]:
    path.mkdir()
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(path)], check=True, timeout=10
    )
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True, timeout=10)


def may_mount() -> bool:
    return os.geteuid() == 0 and shutil.which("mount") is not None


@pytest.mark.parametrize(
    "kind",
    [
        "vanished",
        pytest.param("full", marks=pytest.mark.skipif(not may_mount(), reason="needs mount")),
    ],
)
def test_the_run_goes_on_and_saves_later(
    pools: Pools, command: Any, tmp_path: Path, kind: str
) -> None:
    [undisturbed, _] = pools(2).run(train, command(tmp_path / "undisturbed"))
    disk = small_disk(tmp_path / "disk") if kind == "full" else contextlib.nullcontext(tmp_path)
    with disk as root:
        out = root / "run"
        results = pools(2).run(hindered, command(out), kind)
        assert [result["status"] for result in results] == [0, 0]
        flat = torch.cat([tensor.view(-1) for tensor in undisturbed["tensors"].values()])
        assert torch.equal(results[0]["values"], flat)
        lines = figures(out)
        assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
        for step in (5, 6):
            checkpoint.verify(out / f"checkpoints/step-{step:06d}")
        assert (out / "adapter/adapter_model.safetensors").exists()
        assert not list(out.glob("checkpoints/.step-*"))
