"""Kinds of sources: each gives the records that Python, pandas, pyarrow or `datasets` reads."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pandas
import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from refusals import refusal

from dlora.data import load_examples
from dlora.data.files import read_records, resolve
from dlora.data.kinds import Faults

RECORDS: list[dict[str, Any]] = [
    {"text": 'Hello, "you"', "n": None},
    {"text": "two\nlines\r\nthree", "n": "2"},
    {"text": "\u2028 Größe", "n": "NA"},
    *({"text": f"number {i}", "n": str(i)} for i in range(600)),  # more than one piece of any kind
]
CHATS = [
    {"messages": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": "b" * i}]}
    for i in range(1, 6)
]


def as_lines(records: list[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


def zstd(content: bytes) -> bytes:
    """Two frames one after the other, as `cat a.zst b.zst` makes them."""
    half, compress = len(content) // 2, zstandard.ZstdCompressor().compress
    return compress(content[:half]) + compress(content[half:])


def write_splits(path: Path, records: list[dict[str, Any]]) -> None:
    whole = datasets.Dataset.from_list(records)
    other = datasets.Dataset.from_list([{"text": "another", "n": None}])
    datasets.DatasetDict({"test": other, "train": whole}).save_to_disk(path)


Write = Callable[[Path, list[dict[str, Any]]], Any]
WRITERS: dict[str, Write] = {
    "a.jsonl": lambda path, records: path.write_bytes(as_lines(records)),
    "a.JSONL.GZ": lambda path, records: path.write_bytes(gzip.compress(as_lines(records))),
    "a.jsonl.zst": lambda path, records: path.write_bytes(zstd(as_lines(records))),
    "array.json": lambda path, records: path.write_text(json.dumps(records), "utf-8"),
    "indented.json": lambda path, records: path.write_text(json.dumps(records, indent=2), "utf-8"),
    "array.json.gz": lambda path, records: path.write_bytes(
        gzip.compress(json.dumps(records).encode())
    ),
    "lines.json": lambda path, records: path.write_bytes(as_lines(records)),
    "a.csv": lambda path, records: pandas.DataFrame(records).to_csv(path, index=False),
    "a.tsv": lambda path, records: pandas.DataFrame(records).to_csv(path, index=False, sep="\t"),
    "a.csv.zst": lambda path, records: pandas.DataFrame(records).to_csv(path, index=False),
    "a.parquet": lambda path, records: pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist(records), path, row_group_size=100
    ),
    "saved": lambda path, records: datasets.Dataset.from_list(records).save_to_disk(path),
    "splits": write_splits,
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_gives_the_same_records(name: str, tmp_path: Path) -> None:
    WRITERS[name](tmp_path / name, RECORDS)
    found = list(read_records(str(tmp_path / name), "data.train"))
    assert [record.value for record in found] == RECORDS
    assert all(str(tmp_path / name) in record.where for record in found)
    assert len({record.where for record in found}) == len(RECORDS)


@pytest.mark.parametrize(
    "name", [name for name in WRITERS if "csv" not in name and "tsv" not in name]
)
def test_every_kind_gives_the_data_set_of_its_json_lines(
    name: str, tmp_path: Path, make_tokenizer: Any
) -> None:
    reading: dict[str, Any] = {"key": "data.train", "format": "chat", "max_length": 99}
    reading["tokenizer"] = make_tokenizer()
    for path in (name, "wanted.jsonl"):
        WRITERS.get(path, WRITERS["a.jsonl"])(tmp_path / path, CHATS)
    if name == "splits":
        reading["key"] = "data.train"
    found, wanted = (
        load_examples(str(tmp_path / path), **reading) for path in (name, "wanted.jsonl")
    )
    assert found.fingerprint == wanted.fingerprint


def test_csv_is_what_pandas_reads(tmp_path: Path) -> None:
    """Quoted line breaks, doubled quotes, empty cells; and a line of its own in every error."""
    content = '\ufefftext,n\n"a\n""b"", c",\n\n,"x"\r\nd,null\n"e\n",\'f\n'
    (tmp_path / "a.csv").write_bytes(content.encode())
    frame = pandas.read_csv(
        tmp_path / "a.csv", dtype=str, keep_default_na=False, na_values=[""], encoding="utf-8-sig"
    )
    wanted = [
        {name: None if pandas.isna(cell) else cell for name, cell in row.items()}
        for row in frame.to_dict("records")
    ]
    found = list(read_records(str(tmp_path / "a.csv"), "k"))
    assert [record.value for record in found] == wanted and len(wanted) == 4
    assert [int(record.where.rpartition(":")[2]) for record in found] == [2, 5, 6, 7]


def test_names_and_splits_of_a_saved_data_set(tmp_path: Path) -> None:
    write_splits(tmp_path / "d", RECORDS[:3])
    path = str(tmp_path / "d")
    [record] = read_records({"path": path, "split": "test"}, "data.train")
    assert record.value["text"] == "another" and record.where == f"data.train: {path}: row 1"
    assert len(list(read_records([{"path": path, "split": "train"}], "data.eval"))) == 3
    assert "has several splits; choose one of test, train" in refusal(
        lambda: list(read_records(path, "data.eval"))
    )
    assert "has no split 'x'; choose one of test, train" in refusal(
        lambda: list(read_records({"path": path, "split": "x"}, "data.eval"))
    )
    both = [{"path": path, "split": "train"}, {"path": path, "split": "test"}]
    assert [place.part for place in resolve(both, "data.train")] == [0, 1]


def test_a_glob_and_a_list_mix_kinds(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.csv", "c.parquet"):
        WRITERS["a" + Path(name).suffix](tmp_path / name, RECORDS[:1])
    datasets.Dataset.from_list(RECORDS[:1]).save_to_disk(tmp_path / "d.saved")
    (tmp_path / "other").mkdir()
    found = [place.path.name for place in resolve(str(tmp_path / "*"), "k")]  # type: ignore[union-attr]
    assert found == ["a.jsonl", "b.csv", "c.parquet", "d.saved"]
    assert [r.value for r in read_records(str(tmp_path / "*"), "k")] == RECORDS[:1] * 4


LINE = as_lines([{"text": "a"}])
PARQUET = "cannot be read as Parquet: "
BAD: list[tuple[str, bytes, str]] = [
    ("a.jsonl.gz", LINE, ": not gzip data, as its name says"),
    ("a.jsonl.gz", gzip.compress(LINE, mtime=0)[:-9], ": ends before its compressed data does"),
    ("a.jsonl.gz", gzip.compress(LINE + b"{", mtime=0), ":2: not JSON"),
    ("a.jsonl.zst", LINE, ": not zstd data, as its name says"),
    ("a.jsonl.zst", zstd(LINE)[:-3], ": ends before its compressed data does"),
    ("a.json", b'[{"a": 1},\n {"a": 2}\n {"a": 3}]', ":3: not JSON ('{' where ',' is expected)"),
    ("a.json", b'[{"a": 1},\n {"a": 2,}]', ":2: not JSON ("),
    ("a.json", b'[{"a": 1},\n', ":2: not JSON (Expecting value)"),
    ("a.json", b'[{"a": 1},]', ":1: not JSON ("),
    ("a.json", b'[{"a": 1}\n', ":2: not JSON (the array does not end)"),
    ("a.json", b'[{"a": 1}]\n[]', ":2: not JSON (more text behind the array's end)"),
    ("a.json", b'[{"a": 1},\n3]', ":2 (record 2): a JSON int, not an object"),
    ("a.json", b'[{"a": 1},\n{"a": "\xff"}]', ":2: not UTF-8"),
    ("a.json", b"[]", " contains no records"),
    ("a.json", b"", " is an empty file"),
    ("a.json", b'{"data": [\n{"text": "a"}]}', ": one JSON object over several lines; expected an"),
    ("a.json", b'{"a": 1}\n{"a": }', ":2: not JSON"),
    ("a.csv", b"text,n\na,b,c\n", ":2: 3 cells, but the first line names 2 columns"),
    ("a.csv", b'text,n\n"a\nb",2\na\n', ":4: 1 cells, but the first line names 2"),
    ("a.csv", b'text,n\n1,2\n"a\nb\n', ":3: not CSV (unexpected end of data)"),
    ("a.csv", b'text,n\n"a"b,2\n', ":2: not CSV ("),
    ("a.csv", b"text,n\n\xff,2\n", ":2: not UTF-8"),
    ("a.csv", b"text,text\na,b\n", ":1: the first line has 'text' twice"),
    ("a.csv", b"text,\na,b\n", ":1: the first line has a column without a name"),
    ("a.csv", b"text\n", " contains no records"),
    ("a.parquet", LINE, f": {PARQUET}"),
    ("a.parquet", b"", f": {PARQUET}"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "expected"), BAD)
def test_what_is_damaged_is_refused_by_file_and_line(
    name: str, content: bytes, expected: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    said = refusal(lambda: list(read_records(str(path), "data.train")))
    assert said.startswith(f"data.train: {path}{expected}")


def test_bad_records_of_every_kind_are_skipped_and_counted(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('[{"text": "a"}, 3, null, {"text": "b"}]')
    (tmp_path / "a.csv").write_bytes(b'text,n\na,1\nb\n\xff,2\nc,d,e\n"x"y,1\nd,4\n')
    faults = Faults(skip=True)
    paths = [str(tmp_path / "a.json"), str(tmp_path / "a.csv")]
    found = [record.value["text"] for record in read_records(paths, "k", faults)]
    assert found == ["a", "b", "a", "d"]
    assert faults.count == 6 and faults.first.startswith(f"k: {paths[0]}:1 (record 2): a JSON int")


def test_a_record_longer_than_a_piece_and_one_that_never_ends(tmp_path: Path) -> None:
    long = [{"text": "x" * 3_000_000}, {"text": "y"}]
    (tmp_path / "a.json").write_text(json.dumps(long))
    assert [r.value for r in read_records(str(tmp_path / "a.json"), "k")] == long
    (tmp_path / "b.json").write_text('[{"text": "' + "x" * (34 << 20))
    said = refusal(lambda: list(read_records(str(tmp_path / "b.json"), "k")))
    assert "b.json:1 (record 1): a record of more than 16 MiB" in said


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ({"path": "a.jsonl", "wieght": 2}, "'wieght' is no option of an entry; options: path, wei"),
        ({"weight": 2}, "None is not a file name"),
        ({"path": "a.jsonl", "weight": 0}, "a.jsonl: weight must be a number > 0, got 0"),
        ({"path": "a.jsonl", "weight": "x"}, "weight must be a number > 0, got 'x'"),
        ({"path": "a.jsonl", "weight": float("inf")}, "weight must be a number > 0"),
        ({"path": "a.jsonl", "split": "train"}, "split: train cannot act: it is JSON lines"),
        ({"path": "a.jsonl", "split": 3}, "split is 3; expected a text"),
        ({"path": "saved", "name": "x"}, "name: x cannot act: it is a saved data set"),
        ({"path": "saved", "split": "x"}, "split: x cannot act: the data set has no splits"),
        ("missing", "missing does not exist (working directory "),
        ("sub/owner", "sub/owner does not exist (working directory "),
        ("owner/data.csv", "owner/data.csv does not exist (working directory "),
        ("sub", "sub is a directory; expected a file or a glob: sub/*.jsonl, or a directory that"),
    ],
)  # fmt: skip
def test_bad_entries(source: Any, expected: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    WRITERS["a.jsonl"](tmp_path / "a.jsonl", RECORDS[:1])
    WRITERS["saved"](tmp_path / "saved", RECORDS[:1])
    (tmp_path / "sub").mkdir()
    said = refusal(lambda: list(read_records(source, "data.train")))
    assert said.startswith("data.train: ") and expected in said


def test_a_package_that_is_missing_is_named(tmp_path: Path, monkeypatch: Any) -> None:
    WRITERS["a.parquet"](tmp_path / "a.parquet", RECORDS[:1])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for source in (str(tmp_path / "a.parquet"), "owner/name"):
        said = refusal(resolve, source, "data.train")
        assert said.startswith(f"data.train: {source}: ") and "'dlora[datasets]'" in said
