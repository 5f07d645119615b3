"""The model card beside a run's adapter: the hub's own parser reads it; what was changed stays."""

import functools
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from peft import PeftModel
from tiny import save_chats, whole

from dlora.metrics.log import read_metrics
from dlora.train import main


@pytest.fixture(scope="module")
def words(words: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The command line of a run with held-out data."""
    held = save_chats(tmp_path_factory.mktemp("held") / "chats.jsonl", 2)
    return functools.partial(words, data__eval=str(held))


@pytest.fixture(scope="module")
def ended(words: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has ended."""
    run = tmp_path_factory.mktemp("card") / "run"
    assert main(words(run, train__max_steps=2, output__save_every=2)) == 0
    return run


def test_the_hub_reads_the_card(ended: Path, saved_models: Any) -> None:
    path = ended / "adapter/README.md"
    card = ModelCard.load(path)
    assert card.data.base_model == saved_models("llama")
    assert (card.data.library_name, card.data.license) == ("peft", "unknown")
    assert card.data.pipeline_tag == "text-generation"
    assert card.data.tags == ["lora", "dlora"]
    front = yaml.safe_load(path.read_text().split("---")[1])
    assert front == card.data.to_dict()
    records = read_metrics(ended / "metrics.jsonl")
    for shown in (
        f"| loss of the last step | {records[-1]['loss']:.4f} |",
        f"| held-out loss at step 0 | {records[0]['eval_loss']:.4f} |",
        f"| held-out loss at step 2 | {records[-1]['eval_loss']:.4f} |",
        "| r | 4 |",
        "| optimizer steps | 2 |",
    ):
        assert shown in card.text
    PeftModel.from_pretrained(whole(saved_models("llama")), ended / "adapter")


@pytest.mark.parametrize("change", ["text", "mark", "other"])
def test_a_changed_card_stays(
    change: str, ended: Path, words: Any, tmp_path: Path, capsys: Any
) -> None:
    run = tmp_path / "run"
    shutil.copytree(ended, run)
    path = run / "adapter/README.md"
    text = path.read_text()
    changed = {
        "text": text.replace("license: unknown", "license: mit"),
        "mark": text[: text.rindex("<!--")],
        "other": "mine",
    }[change]
    path.write_text(changed)
    assert again(run, words) == 0
    assert path.read_text() == changed
    assert f"{path} was changed since a run wrote it" in capsys.readouterr().out


def test_an_unchanged_card_is_written_again(ended: Path, words: Any, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(ended, run)
    assert again(run, words, train__max_steps=3) == 0
    assert "| optimizer steps | 3 |" in (run / "adapter/README.md").read_text()


def again(run: Path, words: Any, **settings: Any) -> int:
    """The run that has ended, started again: it only writes its adapter."""
    return main(words(run, **{"train__max_steps": 2, "output__save_every": 2} | settings))


def test_the_licence_is_that_of_the_base_s_card(
    words: Any, saved_models: Any, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(saved_models("llama"), base)
    (base / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A base\n")
    assert main(words(tmp_path / "run", model__path=str(base), train__max_steps=1)) == 0
    card = ModelCard.load(tmp_path / "run/adapter/README.md")
    assert (card.data.license, card.data.base_model) == ("apache-2.0", str(base))
