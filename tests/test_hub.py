"""Ids of the Hugging Face hub, answered by `hub.py`; and each of them without a network."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hub import COMMIT, Hub
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from tiny import command, save_chats, save_model, whole

from dlora.metrics.log import read_metrics

ROOT = Path(__file__).parents[1]
SPLITS = (("train", "train"), ("eval", "test"))


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """A model, PEFT's adapter of it, and chats in two splits."""
    root = tmp_path_factory.mktemp("hub")
    base = save_model(root / "models/tiny/llama", "llama")
    settings = LoraConfig(r=4, target_modules=["q_proj"], base_model_name_or_path="tiny/llama")
    get_peft_model(whole(base), settings).save_pretrained(root / "models/tiny/adapter")
    folder = root / "datasets/tiny/chats/data"
    folder.mkdir(parents=True)
    save_chats(folder / "train.jsonl", 8)
    save_chats(folder / "test.jsonl", 4)
    with Hub(root).served() as hub:
        yield hub


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def ran(words: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    """A command of dlora in a directory in which there is nothing."""
    here = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    program = [sys.executable, "-m", "dlora", *words]
    options: Any = {"capture_output": True, "text": True, "timeout": 300, "env": here}
    return subprocess.run(program, **options, check=False)


def test_a_run_of_ids_is_the_run_of_their_files(hub: Hub, cache: Path, tmp_path: Path) -> None:
    """Trained, resumed from the cache alone, and tried."""
    ids: dict[str, Any] = {"model__path": "tiny/llama", "adapter__path": "tiny/adapter"}
    ids |= {"data__train": "tiny/chats", "adapter__r": None}
    ids["data__eval"] = {"path": "tiny/chats", "split": "test", "revision": "v1"}
    lines = {}
    for name in ("ids", "files"):
        models, data = hub.root / "models/tiny", hub.root / "datasets/tiny/chats/data"
        settings = dict(ids)
        if name == "files":
            settings |= {
                "model__path": str(models / "llama"),
                "data__eval": str(data / "test.jsonl"),
            }
            settings |= {"adapter__path": str(models / "adapter")}
            settings |= {"data__train": str(data / "train.jsonl")}
        (tmp_path / name).mkdir()
        made = ran(["train", *command("", tmp_path / name, **settings)], **hub.environment(cache))
        assert made.returncode == 0, made.stderr[-2000:]
        found = read_metrics(tmp_path / name / "run/metrics.jsonl")
        lines[name] = [
            [line.get(key) for key in ("loss", "batch_hash", "eval_loss")] for line in found
        ]
    assert lines["ids"] == lines["files"]
    adapters = [load_file(tmp_path / n / "run/adapter/adapter_model.safetensors") for n in lines]
    assert all((adapters[0][key] == adapters[1][key]).all() for key in adapters[1])
    written = json.loads((tmp_path / "ids/run/adapter/adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == "tiny/llama"
    asked = " ".join(hub.asked)
    assert f"/datasets/tiny/chats/resolve/{COMMIT}/data/train.jsonl" in asked

    offline = hub.environment(cache) | {"HF_HUB_OFFLINE": "1"}
    hub.asked.clear()
    words = ["train", *command("", tmp_path / "ids", **ids, train__max_steps=3)]
    again = ran(words, **offline)
    assert again.returncode == 0 and "resuming after step 2" in again.stdout, again.stderr[-2000:]
    said = ran(["generate", "--adapter", "tiny/adapter", "--prompt", "Hi"], **offline)
    assert said.returncode == 0, said.stderr[-2000:]
    assert hub.asked == []


# Prints the line with which each of several command lines is refused, one process for all.
REFUSALS = """
import json, sys
from refusals import preparation
from dlora.errors import UsageError

for words in json.loads(sys.argv[1]):
    try:
        preparation(words)
    except UsageError as error:
        print("REFUSED", error)
"""


def refusals(lines: list[list[str]], **environment: str) -> list[str]:
    here = os.environ | environment | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    program = [sys.executable, "-c", REFUSALS, json.dumps(lines)]
    made = subprocess.run(program, capture_output=True, text=True, env=here, check=True)
    return [line[8:] for line in made.stdout.splitlines() if line.startswith("REFUSED ")]


def test_offline_is_one_line(hub: Hub, tmp_path: Path) -> None:
    """Neither in the cache nor reachable: status 2, and nothing was written."""
    base = str(hub.root / "models/tiny/llama")
    offline = hub.environment(tmp_path / "empty") | {"HF_HUB_OFFLINE": "1"}
    made = ran(["train", *command(base, tmp_path, data__train="tiny/chats")], **offline)
    [line] = made.stderr.strip().splitlines()
    assert made.returncode == 2 and line.startswith("dlora: error: data.train: tiny/chats is no ")
    assert "HF_HUB_OFFLINE is set" in line
    assert not (tmp_path / "run/checkpoints").exists()
    adapter = {"adapter__path": "tiny/adapter", "adapter__r": None}
    lines = [command("tiny/llama", tmp_path), command(base, tmp_path, **adapter)]
    of_model, of_adapter = refusals(lines, **offline)
    assert of_model.startswith("model.path: cannot read tiny/llama: ")
    assert of_adapter.startswith("adapter.path: tiny/adapter is no directory here, and cannot be")


def test_what_the_hub_does_not_have_is_one_line(hub: Hub, tmp_path: Path) -> None:
    base = str(hub.root / "models/tiny/llama")
    cases: list[tuple[dict[str, Any], str]] = [
        ({"data__train": "tiny/nothing"}, "data.train: tiny/nothing is no file or directory here"),
        ({"data__train": {"path": "tiny/chats", "split": "x"}}, "data.train: tiny/chats is no "),
        ({"data__train": {"path": "tiny/chats", "revision": "x"}}, "data.train: tiny/chats is no "),
        ({"data__eval": "tiny/chats"}, "data.eval: tiny/chats: has several splits; choose one of"),
        ({"adapter__path": "tiny/no", "adapter__r": None}, "adapter.path: tiny/no is no directory"),
    ]
    lines = [command(base, tmp_path, **setting) for setting, _ in cases]
    found = refusals(lines, **hub.environment(tmp_path / "cache"))
    assert [said[: len(wanted)] for said, (_, wanted) in zip(found, cases, strict=True)] == [
        wanted for _, wanted in cases
    ]
