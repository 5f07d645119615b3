"""`dlora eval`: the loss of transformers' own model, and the very number that the run logged."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from programs import start, status
from refusals import refusal
from run_training import Runs
from sampling import full
from tiny import save_chats, tokenizer, whole
from torch.nn import functional as F

from dlora.data import load_examples
from dlora.evaluation.command import main

SETTINGS = {"data__max_length": 48, "train__max_steps": 3, "output__eval_every": 3}


@pytest.fixture(scope="module")
def held(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_chats(tmp_path_factory.mktemp("held") / "held.jsonl", 11))


def found(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


@torch.no_grad()
def test_a_base_has_the_loss_of_transformers(saved_models: Any, held: str, tmp_path: Path) -> None:
    """Sequence by sequence, weighed by tokens."""
    data = load_examples(held, key="x", format="chat", tokenizer=tokenizer(), max_length=1024)
    model, losses, targets = whole(saved_models("llama")), 0.0, 0
    for example in data:
        labels = torch.tensor(example.labels).long()
        logits = model(torch.tensor(example.input_ids).long()[None]).logits[0, :-1]
        losses += float(F.cross_entropy(logits, labels[1:], reduction="sum"))
        targets += int((labels[1:] >= 0).sum())
    to = tmp_path / "found.json"
    base = ["--base", saved_models("llama"), "--dtype", "float32"]
    assert main([*base, "--data", held, "--batch-size", "3", "--to", str(to)]) == 0
    figures = found(to)["figures"]
    assert figures["loss"] == pytest.approx(losses / targets, rel=1e-5)
    assert figures["perplexity"] == pytest.approx(math.exp(losses / targets), rel=1e-4)
    assert found(to)["tokens"] == targets and found(to)["sequences"] == 11


@pytest.mark.parametrize("quantization", ["none", full("nf4")])
def test_an_adapter_has_the_loss_that_its_run_logged(
    run: Runs, held: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], quantization: str
) -> None:
    """With the run's settings, whatever the number of ranks; of a checkpoint too."""
    every = SETTINGS | {"output__save_every": 3, "model__quantization": quantization}
    every |= {} if quantization == "none" else {"model": "blocks"}
    _, lines = run("run", 2, data__eval=held, sharding__base="world", **every)
    wanted = lines[-1]["eval_loss"]
    assert wanted != pytest.approx(lines[0]["eval_loss"], rel=1e-4)
    for place in ("adapter", "checkpoints/step-000003"):
        to = tmp_path / f"{Path(place).name}.json"
        assert (
            main(["--adapter", str(tmp_path / "run" / place), "--data", held, "--to", str(to)]) == 0
        )
        assert found(to)["figures"]["loss"] == pytest.approx(wanted, rel=1e-6), place
        said = capsys.readouterr().out
        assert "model.dtype: float32" in said and "data.max_length: 48" in said
    log, to = tmp_path / "log", tmp_path / "two.json"
    words = ["--adapter", str(tmp_path / "run/adapter"), "--data", held, "--to", str(to)]
    assert status(start(2, ["dlora.evaluation.command", *words], log)) == 0, log.read_text()
    assert found(to)["figures"]["loss"] == pytest.approx(wanted, rel=1e-6)
    assert log.read_text().count("perplexity") == 1


def test_what_comes_from_the_run_can_be_set_and_another_base_is_said(
    run: Runs, saved_models: Any, held: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("run", 1, data__eval=held, **SETTINGS, output__save_every=3)
    to, other = tmp_path / "to.json", saved_models("tied")
    words = ["--adapter", str(tmp_path / "run/adapter"), "--data", held, "--base", other]
    assert main([*words, "--max-length", "1024", "--limit", "2", "--to", str(to)]) == 0
    assert found(to)["settings"]["max_length"] == 1024 and found(to)["sequences"] == 2
    said = capsys.readouterr().out
    assert "was trained on another base than" in said and "data.max_length" not in said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "give --data, --tasks, or both"),
        (["--data", "none.jsonl"], "--data: none.jsonl does not exist"),
        (["--data", "{held}", "--metrics", "blue"], "'blue' is no name; expected some of"),
        (["--data", "{held}", "--answers", "a"], "--answers cannot act without --metrics"),
        (["--data", "{held}", "--max-new-tokens", "3"], "--max-new-tokens cannot act without"),
        (["--tasks", "t", "--format", "chat"], "--format cannot act without --data"),
        (["--data", "{held}", "--include-path", "."], "--include-path cannot act without --tasks"),
        (["--data", "{held}", "--few-shot", "1"], "--few-shot cannot act without --tasks"),
        (["--data", "{held}", "--to", "{held}"], "exists already; name a new file"),
        (["--data", "{held}", "--to", "no/where.json"], "--to: there is no directory"),
        (["--data", "{held}", "--columns", "a"], "expected FIELD=COLUMN, not 'a'"),
        (["--data", "{held}", "--adapter", "no/where"], "--adapter"),
        (["--data", "{held}", "--dtype", "float64"], "--dtype"),
    ],
)
def test_what_is_refused(
    saved_models: Any, held: str, no_weights_are_read: None, words: list[str], said: str
) -> None:
    base = ["--base", saved_models("llama")]
    assert said in refusal(main, [*base, *(word.format(held=held) for word in words)])
