"""`dlora data`: records, marks and statistics, from a model directory without weights."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from refusals import refusal
from tiny import save_chats, tokenizer

from dlora.data import NO_TARGET, load_examples
from dlora.training.show_data import main, marked


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A tokenizer; there is nothing else to read."""
    tokenizer().save_pretrained(tmp_path / "base")
    (tmp_path / "base/config.json").write_text(json.dumps({"model_type": "llama"}))
    return tmp_path / "base"


def words(base: Path, train: Any, *more: str) -> list[str]:
    source = train if isinstance(train, str) else json.dumps(train)
    given = {"model.path": str(base), "data.train": source, "output.dir": "unused"}
    return [word for key, value in given.items() for word in (f"--{key}", value)] + list(more)


def printed(capsys: Any, argv: list[str]) -> str:
    assert main(argv) == 0
    return str(capsys.readouterr().out)


def test_records_and_statistics(base: Path, tmp_path: Path, capsys: Any) -> None:
    path = save_chats(tmp_path / "chats.jsonl", 40)
    out = printed(capsys, words(base, str(path), "--show", "2", "--data.max_length", "60"))
    data = load_examples(
        str(path), key="data.train", format="chat", tokenizer=tokenizer(), max_length=60
    )
    first = json.loads(path.read_text().splitlines()[0])["messages"]
    assert (
        f"--- data.train, record 1: {len(data[0])} tokens, {data[0].num_targets} targets\n"
        f"<|im_start|>user\n{first[0]['content']}<|im_end|>\n"
        f"<|im_start|>assistant\n[{first[1]['content']}<|im_end|>]\n\n"
    ) in out
    assert out.count("--- data.train, record") == 2 and str(data.report) in out
    low, middle, high, most = np.percentile(data.lengths, [0, 50, 95, 100], method="nearest")
    assert f"lengths: min {low}, median {middle}, p95 {high}, max {most} tokens" in out
    share = data.report.targets / data.lengths.sum()
    assert f"targets: {share:.1%} of {data.lengths.sum()} tokens" in out


def test_weights_and_held_out_data(base: Path, tmp_path: Path, capsys: Any) -> None:
    paths = [str(save_chats(tmp_path / f"{n}.jsonl", n)) for n in (4, 6)]
    train = [{"path": paths[0], "weight": 2.5}, paths[1]]
    out = printed(capsys, words(base, train, "--show=0", f"--data.eval={paths[1]}"))
    assert f"  {paths[0]}: 4 sequences, shown 10 times an epoch\n" in out
    assert "record 1" not in out and "data.eval: 6 records: 6 kept" in out


@pytest.mark.parametrize(("tty", "no_color", "green"), [(1, "", 1), (1, "1", 0), (0, "", 0)])
def test_colour_is_for_terminals(
    tty: bool, no_color: str, green: bool, base: Path, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    monkeypatch.setenv("NO_COLOR", no_color)
    path = save_chats(tmp_path / "chats.jsonl", 1)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: tty, raising=False)
    out = printed(capsys, words(base, str(path)))
    assert ("\x1b[32m" in out) == green
    assert bool(re.search(r"\n\[.*<\|im_end\|>\]", out)) != green


def test_what_a_terminal_would_obey_is_escaped(tmp_path: Path) -> None:
    record = {"text": "a\x1b[2Jb\tc"}
    (tmp_path / "a.jsonl").write_text(json.dumps(record))
    reading: dict[str, Any] = {"key": "data.train", "format": "text", "max_length": 99}
    [one] = load_examples(str(tmp_path / "a.jsonl"), tokenizer=tokenizer(), **reading)
    assert marked(one, tokenizer(), False) == "a[\\x1b[2Jb\tc<|im_end|>]"  # type: ignore[arg-type]


def test_a_blank_in_front_of_a_target_stays(make_pieces: Any, tmp_path: Path) -> None:
    """Tokenizers like Llama 2's drop the blank of a text's first word."""
    pieces = make_pieces
    ids = np.array(pieces.encode("Hello there you", add_special_tokens=False), np.int32)
    labels = np.where(np.arange(len(ids)) >= len(ids) - 1, ids, NO_TARGET)
    shown = marked(type("One", (), {"input_ids": ids, "labels": labels})(), pieces, False)
    assert re.sub(r"[\[\]]", "", shown) == pieces.decode(ids) and "[" in shown


@pytest.fixture
def make_pieces() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["<unk>", "▁Hello", "▁there", "▁you"])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=core)


def test_bad_records_and_options_are_refused(base: Path, tmp_path: Path) -> None:
    path = save_chats(tmp_path / "chats.jsonl", 2)
    with path.open("a") as file:
        file.write("{}\n")
    assert f"{path}:3: " in refusal(main, words(base, str(path)))
    assert refusal(main, words(base, str(path), "--check")).startswith("--check is an option of")
    assert refusal(main, words(base, str(path), "--show=-1")).startswith("--show: must be >= 0")


def test_both_answers_of_a_pair(base: Path, tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps({"prompt": "one", "chosen": " two", "rejected": " three"}))
    more = ["--data.format", "preference", "--train.objective", "dpo", "--show", "1"]
    out = printed(capsys, words(base, str(path), *more))
    assert "record 1: 18 tokens, 12 targets" in out
    assert "chosen: one[ two<|im_end|>]\nrejected: one[ three<|im_end|>]" in out
