"""What the environment keeps secret stays there: in no file of a run and in nothing it prints."""

import os
import pickle
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from refusals import refusal
from tiny import command

from dlora import generate
from dlora.export import command as export
from dlora.train import main

SECRETS = {
    "HF_TOKEN": "hf_ThisIsNoRealToken0001",
    "HUGGING_FACE_HUB_TOKEN": "hf_ThisIsNoRealToken0002",
    "AWS_ACCESS_KEY_ID": "AKIAThisIsNoRealKey0003",
    "AWS_SECRET_ACCESS_KEY": "ThisIsNoRealKey0004",
    "WANDB_API_KEY": "ThisIsNoRealKey0005",
    "GOOGLE_APPLICATION_CREDENTIALS": "/nowhere/ThisIsNoRealKey0006",
}


@pytest.fixture(autouse=True)
def as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Secrets in the environment, and afterwards the signal handlers that there were."""
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_secrets_reach_no_file_and_no_line(
    saved_models: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    base = saved_models("llama")
    settings: dict[str, Any] = {
        "data__eval": str(tmp_path / "chats.jsonl"),
        "output__save_every": 1,
        "output__samples": 1,
    }
    words = command(base, tmp_path, **settings)
    assert main([*words, "--check"]) == 0
    assert main(words) == 0
    adapter = str(tmp_path / "run" / "adapter")
    assert export.main(["--adapter", adapter, "--to", str(tmp_path / "to"), "--merge"]) == 0
    assert generate.main(["--adapter", adapter, "--prompt", "one", "--max-new-tokens", "2"]) == 0
    said = [refusal(main, [*words, "--optimizer.lr", "3"])]
    said += capfd.readouterr()
    texts = {"printed": "\n".join(said).encode()}
    texts |= {str(p): p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    names = {Path(name).name for name in texts}
    assert names >= {
        "config.yaml",
        "state.json",
        "manifest.json",
        "metrics.jsonl",
        "tokenizer.json",
    }
    assert "adapter: " in said[1] and said[0]
    for name, text in texts.items():
        assert [key for key, value in SECRETS.items() if value.encode() in text] == [], name


class Bomb:
    """Unpickled, it makes a directory."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("crater",)


def test_pickles_in_a_run_s_directory(
    saved_models: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether it goes on from there or starts afresh."""
    monkeypatch.chdir(tmp_path)
    settings = {"adapter__method": "adalora", "adapter__r": None, "output__save_every": 1}
    words = command(saved_models("llama"), tmp_path, **settings)
    run = tmp_path / "run"
    run.mkdir()
    for resume in ("none", "auto"):
        for name in (
            "metrics.jsonl",
            "events.jsonl",
            "ranks.json",
            ".lock",
            "config.yaml",
            "nonfinite.json",
        ):
            (run / name).write_bytes(pickle.dumps(Bomb()))
        assert main([*words, "--output.resume", resume]) == 0
        assert not Path("crater").exists()
        shutil.rmtree(run / "checkpoints" / "step-000002")
