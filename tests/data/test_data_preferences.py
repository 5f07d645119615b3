"""Pairs of answers: what a record may be, how it becomes two sequences, and what is refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import tokenizer
from trl import maybe_extract_prompt

from dlora.data import NO_TARGET, load_examples
from dlora.data.builtin import as_pairs, builtin_records
from dlora.data.cache import cached
from dlora.data.formats import AnswerPair, RecordError, read_record
from dlora.data.pairs import collate_pairs, halves
from dlora.errors import UsageError


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def says(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def load(path: Path, rows: list[Any], **options: Any) -> Any:
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows))
    settings = {"key": "data.train", "format": "preference", "max_length": 128, **options}
    return load_examples(str(path), tokenizer=tokenizer(), **settings)


def shown(example: Any) -> list[tuple[str, str]]:
    """(text, its targets) of both sequences."""
    found = []
    for half in halves(example):
        targets = [t for t in half.labels.tolist() if t != NO_TARGET]
        found.append((tokenizer().decode(half.input_ids).rstrip("\n"), tokenizer().decode(targets)))
    return found


ASKED = [user("one"), says("two"), user("three")]
OPEN = "<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\ntwo<|im_end|>\n"
OPEN += "<|im_start|>user\nthree<|im_end|>\n<|im_start|>assistant\n"
GOOD: dict[str, tuple[Any, str]] = {  # a record, and what stands before its answers "a" and "b"
    "texts": ({"prompt": "one two ", "chosen": "a", "rejected": "b"}, "one two "),
    "messages": ({"prompt": ASKED, "chosen": [says("a")], "rejected": [says("b")]}, OPEN),
    "answers": ({"prompt": ASKED, "chosen": "a", "rejected": "b"}, OPEN),
    "implicit": ({"chosen": [*ASKED, says("a")], "rejected": [*ASKED, says("b")]}, OPEN),
    "repeated": (
        {"prompt": ASKED, "chosen": [*ASKED, says("a")], "rejected": [*ASKED, says("b")]},
        OPEN,
    ),
    "asked in a text": (  # as in UltraFeedback
        {"prompt": "three", "chosen": [*ASKED, says("a")], "rejected": [*ASKED, says("b")]},
        OPEN,
    ),
    "system": (
        {"prompt": "one", "chosen": [says("a")], "rejected": [says("b")], "system": "Hm."},
        "<|im_start|>system\nHm.<|im_end|>\n<|im_start|>user\none<|im_end|>\n"
        "<|im_start|>assistant\n",
    ),
}


@pytest.mark.parametrize("case", GOOD)
def test_both_answers_stand_behind_their_prompt(case: str, tmp_path: Path) -> None:
    record, prompt = GOOD[case]
    [example] = load(tmp_path / "pairs.jsonl", [record])
    assert shown(example) == [(f"{prompt}{a}<|im_end|>", f"{a}<|im_end|>") for a in "ab"]


@pytest.mark.parametrize(
    ("chosen", "rejected"),
    [
        ("Human: one\n\nAssistant: two three", "Human: one\n\nAssistant: four"),
        ("one two three", "one two four"),
        ("x y z", "q r"),
    ],
)
def test_the_prompt_that_texts_share_is_that_of_trl(chosen: str, rejected: str) -> None:
    record = {"chosen": chosen, "rejected": rejected}
    content, _ = read_record("preference", record)
    wanted = maybe_extract_prompt(record)
    assert isinstance(content, AnswerPair)
    for name in ("chosen", "rejected"):
        found: Any = getattr(content, name)
        assert (found.prompt, found.completion) == (wanted["prompt"], wanted[name])


def test_answers_are_cut_at_whole_words() -> None:
    content, _ = read_record("preference", {"chosen": "it is red", "rejected": "it is reddish"})
    assert isinstance(content, AnswerPair) and not isinstance(content.chosen, list)
    assert (content.chosen.prompt, content.chosen.completion) == ("it is", " red")


@pytest.mark.parametrize("turns", [1, 2])
def test_answers_of_several_turns(turns: int, tmp_path: Path) -> None:
    """All that follows where the two part is trained on, but what others say."""
    more = [says("a"), user("and?"), says("aa")][: 2 * turns - 1]
    [example] = load(
        tmp_path / "p.jsonl", [{"chosen": [*ASKED, *more], "rejected": [*ASKED, says("b")]}]
    )
    assert shown(example)[0][1] == ("a<|im_end|>" if turns == 1 else "a<|im_end|>aa<|im_end|>")


PAIR = {"prompt": "one", "chosen": "a", "rejected": "b"}
BAD: dict[str, tuple[Any, str]] = {
    "tie": (PAIR | {"rejected": "a"}, "'chosen' and 'rejected' are the same"),
    "tie of messages": (
        {"prompt": ASKED, "chosen": [says("a")], "rejected": [says("a")]},
        "'chosen' and 'rejected' are the same",
    ),
    "implicit tie": (
        {"chosen": [*ASKED, says("a")], "rejected": [*ASKED, says("a")]},
        "are the same",
    ),
    "tie of texts": ({"chosen": "a b", "rejected": "a b"}, "are the same"),
    "empty": (PAIR | {"chosen": " "}, "'chosen' is empty"),
    "empty message": (
        {"prompt": ASKED, "chosen": [says(" ")], "rejected": "b"},
        "is an empty answer",
    ),
    "nothing": (PAIR | {"rejected": []}, "'rejected' is empty"),
    "null": (PAIR | {"rejected": None}, "'rejected' is null"),
    "number": (PAIR | {"chosen": 3}, "'chosen' is a number"),
    "list": (PAIR | {"prompt": [1]}, "prompt[0] is a number"),
    "prompt": (PAIR | {"prompt": 1}, "'prompt' is a number"),
    "missing": ({"prompt": "one", "chosen": "a"}, "the record has no field 'rejected'"),
    "only the beginning": ({"chosen": "a ", "rejected": "a b"}, "is the beginning of the other"),
    "no answer": (
        {"prompt": ASKED, "chosen": ASKED, "rejected": "b"},
        "no answer behind the prompt",
    ),
    "ends with a question": (
        {"prompt": ASKED, "chosen": [says("a"), user("b")], "rejected": "b"},
        "'chosen' ends with role 'user'",
    ),
    "asks two things": (
        {"prompt": "x", "chosen": [user("y"), says("a")], "rejected": [user("y"), says("b")]},
        "the messages of the answers ask something else",
    ),
    "surrogate": (PAIR | {"chosen": "\ud800"}, "half a surrogate pair"),
    "not JSON": ("{", "not JSON"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_pair_stops_by_its_line_or_is_counted(case: str, tmp_path: Path) -> None:
    record, message = BAD[case]
    rows, path = [PAIR, record, PAIR | {"chosen": "c"}], tmp_path / "pairs.jsonl"
    with pytest.raises(UsageError) as refused:
        load(path, rows)
    said = str(refused.value)
    assert f"{path}, line 2" in said or f"{path}:2" in said
    assert message in said and "\n" not in said
    data = load(path, rows, on_error="skip")
    assert (len(data), data.report.skipped) == (2, 1)
    assert message in data.report.first_fault


def test_what_is_too_long_is_counted(tmp_path: Path) -> None:
    """A prompt that leaves no answer, or no difference between the two, is dropped."""
    rows = [
        PAIR,
        PAIR | {"prompt": "x" * 40},
        {"prompt": "x" * 14, "chosen": "aab", "rejected": "aac"},
        PAIR | {"chosen": "a" * 40},
    ]
    data = load(tmp_path / "pairs.jsonl", rows, max_length=16)
    report = data.report
    assert (report.records, report.kept, report.dropped, report.shortened) == (4, 2, 2, 1)
    assert report.longest == 16
    assert [len(half) for half in halves(data[1])] == [16, 5]
    assert report.targets == 2 + 2 + 13 + 2
    with pytest.raises(UsageError, match="none of 1 records has a target token within"):
        load(tmp_path / "pairs.jsonl", rows[1:2], max_length=16)


def test_a_batch_has_a_row_for_each_answer(tmp_path: Path) -> None:
    data = load(tmp_path / "pairs.jsonl", [PAIR, PAIR | {"chosen": "cc"}])
    batch = collate_pairs(data[:], 7)
    assert (batch.weight, batch.num_targets) == (2, sum(batch.counts))
    assert batch.counts == [2, 3, 2, 2]  # chosen, chosen, rejected, rejected
    assert batch.ids == [0, 2, 1, 3]
    for row, half in enumerate([halves(e)[side] for side in (0, 1) for e in data[:]]):
        assert batch.input_ids[row, : len(half)].tolist() == half.input_ids.tolist()
        assert (batch.input_ids[row, len(half) :] == 7).all()
    moved = batch.to("cpu")
    assert moved.counts == batch.counts
    empty = collate_pairs([], 7)
    assert (empty.weight, empty.places, empty.num_targets) == (0, 8, 0)


def test_pairs_come_back_from_the_cache(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    made = load(path, [PAIR, PAIR | {"chosen": "cc"}])
    settings = {"key": "data.train", "format": "preference", "max_length": 128}
    settings |= {"on_error": "stop", "columns": {}, "labels": (), "most": None}
    lines: list[str] = []
    given: dict[str, Any] = {"source": str(path), "tokenizer": tokenizer(), **settings}
    for _ in range(2):
        again = cached(tmp_path / "c", lambda: load_examples(**given), lines.append, **given)
        assert again.fingerprint == made.fingerprint
        assert np.array_equal(again.arrays[1], made.arrays[1])
    assert len(list((tmp_path / "c").rglob("*"))) > 0


def test_fields_that_nothing_reads_are_counted_once(tmp_path: Path) -> None:
    rows = [
        PAIR | {"score": 1},
        {"chosen": [*ASKED, says("a")], "rejected": [*ASKED, says("b")], "score": 2},
    ]
    data = load(tmp_path / "pairs.jsonl", rows)
    assert data.report.ignored == {"score": 2}
    with pytest.raises(RecordError):
        read_record("preference", {"chosen": "a"})


def test_the_builtin_data_as_pairs() -> None:
    """The records in their order, each with the answer of another one."""
    records = builtin_records("docstrings-heldout")
    found = as_pairs(records)
    assert len(found) == len(records)
    for pair, record in zip(found, records, strict=True):
        assert [*pair["prompt"], *pair["chosen"]] == record["messages"]
        assert pair["rejected"] != pair["chosen"]
        assert any(other["messages"][-1:] == pair["rejected"] for other in records)
    settings = {"key": "data.train", "format": "preference", "max_length": 512}
    data = load_examples("builtin:docstrings-heldout", tokenizer=tokenizer(), **settings)
    assert data.report.records == len(records)
