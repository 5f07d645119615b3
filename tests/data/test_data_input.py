"""Reading: every format, every way to name files, and one line of error for everything wrong."""

import json
from pathlib import Path
from typing import Any

import pytest
from refusals import refusal

from dlora.data import FORMATS, load_examples
from dlora.data.files import read_records, resolve
from dlora.data.formats import RecordError, read_record
from dlora.errors import UsageError

CHAT: dict[str, list[Any]] = {
    "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
}
EXPECTED = [("user", "a"), ("assistant", "b")]


@pytest.mark.parametrize(
    ("name", "record", "expected"),
    [
        ("chat", CHAT, EXPECTED),
        ("chat", {**CHAT, "id": 7, "source": None}, EXPECTED),
        ("chat", {"messages": [{"role": "tool", "content": ""}, CHAT["messages"][1]]},
         [("tool", ""), ("assistant", "b")]),
        ("chat", {"messages": [{**t, "tool_calls": None} for t in CHAT["messages"]]}, EXPECTED),
        ("sharegpt", {"conversations": [{"from": "human", "value": "a"},
                                        {"from": "gpt", "value": "b"}]}, EXPECTED),
        ("sharegpt", {"system": "s", "conversations": [{"from": "user", "value": "a"},
                                                       {"from": "assistant", "value": "b"}]},
         [("system", "s"), *EXPECTED]),
        ("sharegpt", {"conversations": [{"from": "system", "value": "s"},
                                        {"from": "gpt", "value": "b"}]},
         [("system", "s"), ("assistant", "b")]),
        ("alpaca", {"instruction": "a", "output": "b"}, EXPECTED),
        ("alpaca", {"instruction": "a", "input": None, "output": "b", "system": ""}, EXPECTED),
        ("alpaca", {"instruction": "a", "input": "i", "output": "b", "system": "s"},
         [("system", "s"), ("user", "a\n\ni"), ("assistant", "b")]),
    ],
)  # fmt: skip
def test_conversations(name: str, record: dict[str, Any], expected: list[tuple[str, str]]):
    conversation = FORMATS[name].read(record)
    assert isinstance(conversation, list)
    assert [(turn["role"], turn["content"]) for turn in conversation] == expected
    assert all(set(turn) == {"role", "content"} for turn in conversation)


def test_text_is_taken_as_it_is():
    assert FORMATS["text"].read({"text": " a\n"}) == " a\n"


def user(content: Any = "a", **more: Any) -> dict[str, Any]:
    return {"role": "user", "content": content, **more}


def assistant(content: Any = "b", **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


BAD_RECORDS: list[tuple[str, dict[str, Any], str]] = [
    ("chat", {}, "no field 'messages', only nothing; see data.format"),
    ("chat", {"text": "a"}, "no field 'messages', only 'text'; see data.format"),
    ("chat", {"messages": "a"}, "'messages' is a string; expected a list of objects"),
    ("chat", {"messages": None}, "'messages' is null; expected a list"),
    ("chat", {"messages": []}, "'messages' is empty"),
    ("chat", {"messages": ["a"]}, "messages[0] is a string; expected an object with 'role' and"),
    ("chat", {"messages": [user(), {"content": "b"}]}, "messages[1] has no field 'role', only"),
    ("chat", {"messages": [user(), {"role": "assistant"}]}, "messages[1] has no field 'content'"),
    ("chat", {"messages": [user(5)]}, "messages[0].content is a number; expected a string"),
    ("chat", {"messages": [user([{}])]}, "messages[0].content[0] is a part of type 'nothing'; "),
    ("chat", {"messages": [user({})]}, "messages[0].content is an object; expected a string"),
    ("chat", {"messages": [user(), assistant(None)]}, "messages[1].content is null; expected"),
    ("chat", {"messages": [{"role": True, "content": ""}]}, "messages[0].role is a boolean"),
    ("chat", {"messages": [{"role": "gpt", "content": ""}]},
     "messages[0] has role 'gpt'; expected one of 'system', 'developer', 'user', 'assistant', "
     "'tool', 'function'"),
    ("chat", {"messages": [user()]},
     "'messages' has nothing to train on; expected a message with role 'assistant'"),
    ("chat", {"messages": [user(), assistant(" \n")]}, "messages[1] is an empty answer"),
    ("chat", {"messages": [user(), assistant(weight=2)]}, "messages[1] has 'weight': 2; expected"),
    ("chat", {"messages": [user("\ud800")]}, "messages[0].content contains half a surrogate pair"),
    ("sharegpt", CHAT, "no field 'conversations', only 'messages'"),
    ("sharegpt", {"conversations": [{"from": "fox", "value": "a"}]}, "[0] has from 'fox'; exp"),
    ("sharegpt", {"conversations": [{"from": "gpt", "value": ""}]}, "conversations[0] is an empty"),
    ("sharegpt", {"conversations": [{"from": "human", "value": "a"}]}, "a message with from 'gpt'"),
    ("sharegpt", {"conversations": [{"from": "human", "content": "a"}]}, "has no field 'value'"),
    ("alpaca", {"output": "a"}, "no field 'instruction', only 'output'"),
    ("alpaca", {"instruction": "a"}, "no field 'output'"),
    ("alpaca", {"instruction": "", "output": "b"}, "'instruction' is empty; expected some text"),
    ("alpaca", {"instruction": "a", "output": " "}, "'output' is empty; expected some text"),
    ("alpaca", {"instruction": "a", "output": {}}, "'output' is an object; expected a string"),
    ("alpaca", {"instruction": "a", "output": "b", "input": 1}, "'input' is a number"),
    ("text", {"text": ""}, "'text' is empty"),
    ("text", {"text": ["a"]}, "'text' is a list; expected a string"),
    ("text", {f"f{i}": 0 for i in range(20)},
     "only 'f0', 'f1', 'f2', 'f3', 'f4', 'f5', 'f6', 'f7', ...; see"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "record", "expected"), BAD_RECORDS)
def test_a_bad_record_names_file_and_line(
    name: str, record: dict[str, Any], expected: str, jsonl: Any, make_tokenizer: Any
):
    good = {**CHAT, "conversations": [{"from": "gpt", "value": "b"}], "text": "t"}
    path = jsonl({**good, "instruction": "a", "output": "b"}, record)
    reading = {"key": "data.eval", "format": name, "max_length": 99}
    said = refusal(load_examples, path, tokenizer=make_tokenizer(), **reading)
    assert said.startswith(f"data.eval: {path}:2: ") and expected in said
    with pytest.raises(RecordError):
        read_record(name, record)


def refused(source: Any) -> str:
    return refusal(lambda: list(read_records(source, "data.train")))


BAD_FILES: list[tuple[bytes, str]] = [
    (b"", " is an empty file; expected one JSON object per line"),
    (b"\xef\xbb\xbf", " contains only blank lines"),
    (b"\n  \r\n\n", " contains only blank lines; expected one JSON object per line"),
    (b'{"a": 1}\n{"a": "\xff"}\n', ":2: not UTF-8 (byte 8 of the line is 0xff); convert"),
    ('{"a": 1}'.encode("utf-16"), ":1: not UTF-8 (byte 1 of the line is 0xff)"),
    (b'{"a": 1}\n\n{"a": 1\n', ":3: not JSON (Expecting ',' delimiter at column "),
    (b'{"a": 1}{"a": 2}\n', ":1: not JSON (Extra data at column 9); expected one whole JSON"),
    (b'[\n{"a": 1}\n]\n', ":1: not JSON (Expecting value at column "),
    (b'[{"a": 1}]', ":1: a JSON list, not an object"),
    (b'{"a": 1}\n"text"\n', ":2: a JSON str, not an object"),
    (b"[" * 100_000, ":1: JSON that Python cannot represent"),
    (b'{"a": ' + b"1" * 5000 + b"}", ":1: JSON that Python cannot represent"),
]


@pytest.mark.parametrize(("content", "expected"), BAD_FILES)
def test_a_bad_file_names_file_and_line(content: bytes, expected: str, tmp_path: Path):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    assert refused(str(path)).startswith(f"data.train: {path}{expected}")


def test_blank_lines_a_bom_and_other_line_ends_are_taken(tmp_path: Path):
    path = tmp_path / "good.jsonl"
    lines = ["\ufeff" + '{"a": "x\u2028y"}', "", '  {"a": "\u0085"}  \r', "\t", '{"a": 3}']
    path.write_bytes("\n".join(lines).encode())
    records = list(read_records(str(path), "k"))
    assert [record.value for record in records] == [{"a": "x\u2028y"}, {"a": "\x85"}, {"a": 3}]
    assert [record.where for record in records] == [f"k: {path}:{n}" for n in (1, 3, 5)]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: Any) -> Path:
    for name in ("b.jsonl", "a.jsonl", "[x].jsonl", "sub/c.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps({"text": name}))
    (tmp_path / "link.jsonl").symlink_to("a.jsonl")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("b.jsonl", ["b.jsonl"]),
        (["b.jsonl", "a.jsonl"], ["b.jsonl", "a.jsonl"]),
        ("[ab].jsonl", ["a.jsonl", "b.jsonl"]),
        ("**/*c.jsonl", ["sub/c.jsonl"]),
        (["sub/*", "?.jsonl"], ["sub/c.jsonl", "a.jsonl", "b.jsonl"]),
        ("[x].jsonl", ["[x].jsonl"]),  # a file of that very name
        ("~/a.jsonl", ["~/a.jsonl"]),
    ],
)
def test_ways_to_name_files(source: Any, expected: list[str], folder: Path):
    found = [place.path for place in resolve(source, "k")]
    assert found == [Path(name).expanduser() for name in expected]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("no.jsonl", "data.train: no.jsonl does not exist (working directory "),
        ("sub", "data.train: sub is a directory; expected a file or a glob: sub/*.jsonl"),
        ("no*.jsonl", "data.train: no file matches no*.jsonl (working directory "),
        ("su?", "data.train: no file matches su?"),
        ([], "data.train is an empty list"),
        ([""], "data.train: '' is not a file name"),
        ([None], "data.train: None is not a file name"),
        (["a.jsonl"] * 2, "data.train: a.jsonl is named twice, by 'a.jsonl' and by 'a.jsonl'"),
        (["a.jsonl", "[ab].jsonl"], "data.train: a.jsonl is named twice"),
        (["a.jsonl", "link.jsonl"], "data.train: link.jsonl is named twice"),
        ("/dev/null", "data.train: /dev/null is not a regular file"),
        (
            "builtin:poems",
            "data.train: unknown data set builtin:poems; expected builtin:docstrings or ",
        ),
        (
            ["a.jsonl", "builtin:docstrings"],
            "data.train: builtin:docstrings cannot be one of a list",
        ),
    ],
)
def test_bad_sources(source: Any, expected: str, folder: Path):
    assert refused(source).startswith(expected)


def test_a_file_that_cannot_be_read(folder: Path, monkeypatch: Any):
    def refuse(self: Path, mode: str) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(UsageError, match=r"^k: a.jsonl: Permission denied$"):
        list(read_records("a.jsonl", "k"))
