"""`data.cache_dir`: the same data set without encoding it, and another name for other content."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from refusals import refusal

from dlora.data import Dataset, load_examples
from dlora.data.cache import cached

RECORDS = [
    {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}
    for q, a in (("Hi", "yes"), ("How many?", "42 of them"), ("Who?", "nobody"))
]


class Encoded:
    """encoded(directory, path, tokenizer, **settings): the data set; counts what was encoded."""

    def __init__(self) -> None:
        self.times = 0
        self.said: list[str] = []

    def __call__(self, directory: Path, path: Any, tokenizer: Any, **settings: Any) -> Dataset:
        arguments: dict[str, Any] = {"key": "data.train", "format": "chat", "max_length": 99}
        arguments |= {"source": str(path), "tokenizer": tokenizer, **settings}

        def build() -> Dataset:
            self.times += 1
            return load_examples(**arguments)

        return cached(directory, build, self.said.append, **arguments)


@pytest.fixture
def encoded() -> Encoded:
    return Encoded()


def test_the_second_time_nothing_is_encoded(
    encoded: Encoded, make_tokenizer: Any, jsonl: Any, tmp_path: Path
) -> None:
    path, tokenizer = jsonl(*RECORDS), make_tokenizer()
    first = encoded(tmp_path / "cache", path, tokenizer)
    again = encoded(tmp_path / "cache", path, make_tokenizer())
    assert encoded.times == 1
    assert (again.fingerprint, str(again.report)) == (first.fingerprint, str(first.report))
    assert [e.input_ids.tolist() for e in again] == [e.input_ids.tolist() for e in first]
    [wrote, read] = encoded.said
    assert "written to" in wrote and "read from" in read and str(tmp_path / "cache") in read


def test_other_content_is_encoded(
    encoded: Encoded, make_tokenizer: Any, jsonl: Any, tmp_path: Path
) -> None:
    path, tokenizer = jsonl(*RECORDS), make_tokenizer()
    encoded(tmp_path, path, tokenizer)
    encoded(tmp_path, path, tokenizer, max_length=70)
    encoded(tmp_path, path, tokenizer, most=2)
    other = make_tokenizer()
    other.chat_template += "{{ '!' }}"
    encoded(tmp_path, path, other)
    Path(path).write_text(json.dumps(RECORDS[0]) + "\n")
    assert len(encoded(tmp_path, path, tokenizer)) == 1
    assert encoded.times == 5


def test_a_damaged_file_is_encoded_anew(
    encoded: Encoded, make_tokenizer: Any, jsonl: Any, tmp_path: Path
) -> None:
    path, tokenizer = jsonl(*RECORDS), make_tokenizer()
    first = encoded(tmp_path / "cache", path, tokenizer)
    [file] = (tmp_path / "cache").glob("*.safetensors")
    whole = file.read_bytes()
    for content in (whole[:-4], whole[:40], b"", whole[:-1] + bytes([whole[-1] ^ 1])):
        file.write_bytes(content)
        assert encoded(tmp_path / "cache", path, tokenizer).fingerprint == first.fingerprint
        assert len(file.read_bytes()) == len(whole)
    assert encoded.times == 5


def test_of_many_at_once_one_encodes(
    encoded: Encoded, make_tokenizer: Any, jsonl: Any, tmp_path: Path
) -> None:
    path, tokenizers = jsonl(*RECORDS), [make_tokenizer() for _ in range(4)]
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda t: encoded(tmp_path, path, t).fingerprint, tokenizers))
    assert encoded.times == 1 and len(set(found)) == 1


def test_a_directory_that_is_a_file_is_refused(
    encoded: Encoded, make_tokenizer: Any, jsonl: Any, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    said = refusal(encoded, tmp_path / "file", jsonl(*RECORDS), make_tokenizer())
    assert said.startswith(f"data.cache_dir: {tmp_path / 'file'}: ")
