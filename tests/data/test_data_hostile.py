"""Data that nobody meant to train on: a record is refused by its line, or skipped and counted."""

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from random_records import records
from refusals import refusal
from sampling import full
from templates import QWEN, THREE_ROLES

from dlora.data import FORMATS, load_examples
from dlora.data.files import read_records
from dlora.data.kinds import Faults
from dlora.data.kinds.kind import LONGEST_RECORD
from dlora.errors import UsageError


def chat(*turns: tuple[str, str]) -> bytes:
    return json.dumps({"messages": [{"role": r, "content": c} for r, c in turns]}).encode()


GOOD = [
    chat(("user", question), ("assistant", answer))
    for question, answer in (("Hello", "I am fine"), ("How are you", "42"), ("What", "the answer"))
]
BAD = {
    "not json": (b"{", "not JSON"),
    "nul": (b'{"messages": "\0"}', "not JSON"),
    "latin-1": ("{é".encode("latin-1"), "not UTF-8"),
    "surrogate": (chat(("user", "\ud800")), "half a surrogate pair"),
    "deep": (b'{"messages": ' + b"[" * 100_000, "JSON that Python cannot represent"),
    "number": (b'{"messages": ' + b"9" * 10_000 + b"}", "JSON that Python cannot represent"),
    "list": (b"[]", "a JSON list, not an object"),
    "empty": (b'{"messages": []}', "'messages' is empty"),
    "no answer": (chat(("user", "a")), "has nothing to train on"),
    "empty answer": (chat(("user", "a"), ("assistant", " ")), "is an empty answer"),
    "role": (chat(("judge", "a"), ("assistant", "b")), "has role 'judge'"),
}


def load(path: Path, tokenizer: Any, **options: Any) -> Any:
    kwargs = {"key": "data.train", "format": "chat", "max_length": 64, **options}
    return load_examples(str(path), tokenizer=tokenizer, **kwargs)


def written(path: Path, lines: list[bytes]) -> Path:
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


@pytest.mark.parametrize("case", BAD)
def test_the_first_bad_record_stops_by_its_line(
    case: str, tmp_path: Path, make_tokenizer: Any
) -> None:
    line, message = BAD[case]
    path = written(tmp_path / "d.jsonl", [GOOD[0], line, GOOD[1]])
    said = refusal(load, path, make_tokenizer())
    assert said.startswith(f"data.train: {path}:2: ") and message in said


def test_skipping_leaves_the_data_set_of_the_good_records(
    tmp_path: Path, make_tokenizer: Any
) -> None:
    bad = [line for line, _ in BAD.values()]
    mixed = written(tmp_path / "mixed.jsonl", [GOOD[0], *bad, GOOD[1], b"", GOOD[2]])
    good = written(tmp_path / "good.jsonl", GOOD)
    tokenizer = make_tokenizer()
    found, expected = load(mixed, tokenizer, on_error="skip"), load(good, tokenizer)
    assert found.fingerprint == expected.fingerprint
    assert (found.report.records, found.report.skipped) == (len(GOOD), len(BAD))
    said = f"{len(BAD)} more skipped (data.on_error), the first: data.train: {mixed}:2: not JSON"
    assert said in str(found.report)
    assert "skipped" not in str(expected.report)


def test_a_template_that_fails_is_a_fault_of_its_record(
    tmp_path: Path, make_tokenizer: Any
) -> None:
    template = (
        "{% if messages[0]['content'] == 'bad' %}{{ raise_exception('no') }}{% endif %}"
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    bad = chat(("user", "bad"), ("assistant", "b"))
    path = written(tmp_path / "d.jsonl", [GOOD[0], bad])
    with pytest.raises(UsageError, match=r"d\.jsonl:2: the model's chat template refuses"):
        load(path, tokenizer)
    assert load(path, tokenizer, on_error="skip").report.skipped == 1


def test_nothing_but_bad_records_is_an_error(tmp_path: Path, make_tokenizer: Any) -> None:
    path = written(tmp_path / "d.jsonl", [line for line, _ in BAD.values()])
    with pytest.raises(UsageError, match=rf"none of {len(BAD)} records can be used, the first: "):
        load(path, make_tokenizer(), on_error="skip")


def test_a_line_that_does_not_end_is_passed_over_in_pieces(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    with path.open("wb") as file:
        file.write(GOOD[0] + b"\n")
        file.truncate(1 << 28)  # sparse: NUL bytes that take no room
        file.seek(0, 2)
        file.write(b"\n" + GOOD[1] + b"\n")
    faults = Faults(skip=True)
    tracemalloc.start()
    try:
        records = list(read_records(str(path), "data.train", faults))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert [record.value for record in records] == [json.loads(line) for line in GOOD[:2]]
    assert (faults.count, records[1].where) == (1, f"data.train: {path}:3")
    assert "2: a line of more than 16 MiB" in faults.first
    assert peak < 5 * LONGEST_RECORD


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
TURNS = st.lists(
    st.dictionaries(st.sampled_from(["role", "content", "from", "value"]), JSON | st.text())
    | st.fixed_dictionaries(
        {"role": st.sampled_from(["system", "user", "assistant", "tool"]), "content": st.text()}
    ),
    max_size=5,
)
RECORDS = JSON | st.fixed_dictionaries({"messages": TURNS}) | st.dictionaries(
    st.sampled_from(["messages", "conversations", "instruction", "output", "text", "system"]),
    JSON | TURNS,
)  # fmt: skip
LINES = st.one_of(st.binary(max_size=60), RECORDS.map(lambda value: json.dumps(value).encode()))


@pytest.mark.parametrize("examples", [300, full(2000)])
def test_any_lines_are_a_data_set_or_one_line_of_error(
    examples: int, tmp_path: Path, make_tokenizer: Any
) -> None:
    tokenizer = make_tokenizer()

    @settings(
        max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck), database=None
    )
    @given(st.lists(LINES, max_size=4), st.sampled_from(sorted(FORMATS)), st.booleans())
    def check(lines: list[bytes], format: str, skip: bool) -> None:
        path = written(tmp_path / "d.jsonl", lines)
        try:
            load(path, tokenizer, format=format, on_error="skip" if skip else "stop")
        except UsageError as error:
            assert "\n" not in str(error)

    check()


@pytest.mark.parametrize("format", sorted(FORMATS))
@pytest.mark.parametrize("template", [QWEN, THREE_ROLES], ids=["qwen", "three roles"])
def test_no_record_and_no_field_is_lost_without_a_count(
    format: str, template: str, tmp_path: Path, make_tokenizer: Any
) -> None:
    """500 records of each format, many of them odd; each is taken or counted."""
    made = records(format, 250, 1 + (template is QWEN))
    path = written(tmp_path / "d.jsonl", [json.dumps(record).encode() for record in made])
    data = load(path, make_tokenizer(template), format=format, on_error="skip", max_length=200)
    report = data.report
    assert report.records + report.skipped == len(made)
    assert report.kept + report.dropped == report.records
    assert report.ignored["nothing reads this"] == report.records > len(made) // 6
    assert "\n" not in str(report) and len(data) == report.kept
