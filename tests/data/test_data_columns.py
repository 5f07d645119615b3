"""`data.columns`: the data set of records with the format's own names, or an error by its key."""

from typing import Any

import pytest
from refusals import refusal

from dlora.data import load_examples

ALPACA = [{"instruction": "a", "output": "b", "input": "c"}, {"instruction": "d", "output": "e"}]


def load(path: Any, tokenizer: Any, format: str = "alpaca", **settings: Any) -> Any:
    named: dict[str, Any] = {"key": "data.train", "format": format, "max_length": 99}
    return load_examples(path, tokenizer=tokenizer, **named, **settings)


def test_renamed_columns_give_the_same_data_set(jsonl: Any, make_tokenizer: Any) -> None:
    names = {"instruction": "question", "output": "answer", "input": "context"}
    other = [{names[name]: value for name, value in record.items()} for record in ALPACA]
    tokenizer = make_tokenizer()
    wanted = load(jsonl(*ALPACA), tokenizer)
    assert load(jsonl(*other), tokenizer, columns=names).fingerprint == wanted.fingerprint


def test_swapped_and_replaced_columns(jsonl: Any, make_tokenizer: Any) -> None:
    tokenizer = make_tokenizer()
    wanted = load(jsonl({"instruction": "a", "output": "b"}), tokenizer).fingerprint
    swapped = {"instruction": "output", "output": "instruction"}
    record = {"instruction": "b", "output": "a"}
    assert load(jsonl(record), tokenizer, columns=swapped).fingerprint == wanted
    record = {"instruction": "of another format", "q": "a", "output": "b"}
    columns = {"instruction": "q"}
    assert load(jsonl(record), tokenizer, columns=columns).fingerprint == wanted


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"text": "q"}, "data.columns.text: data.format: alpaca reads no 'text'; it reads 'ins"),
        ({"text": "r"}, "data.columns.text: no record of data.train has a column 'r'"),
        ({"output": "output"}, "data.columns.output: it is called 'output' already"),
        ({"system": "rules"}, "data.columns.system: no record of data.train has a column 'rules'"),
        ({"output": "answer"}, "no column 'answer' (data.columns.output)"),
    ],
)
def test_useless_mappings_are_refused_by_key(
    columns: dict[str, str], expected: str, jsonl: Any, make_tokenizer: Any
) -> None:
    records = [{**record, "q": "of nobody"} for record in ALPACA]
    if columns == {"output": "answer"}:
        records = [{"instruction": "a", "reply": "b"}]
    assert expected in refusal(load, jsonl(*records), make_tokenizer(), columns=columns)
