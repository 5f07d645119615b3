"""`data.streaming`: the order by its definition, resuming, counting, errors, and flat memory."""

import gc
import json
import os
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from refusals import refusal

from dlora.data import Sampler, load_examples
from dlora.data.stream import Stream, StreamSampler


def record(i: int) -> dict[str, Any]:
    """A chat of its own length; each 7th one is too long for its answer to be reached."""
    question = "x" * 200 if i % 7 == 3 else str(i)
    turns = (("user", question), ("assistant", f"answer {i}"))
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


@pytest.fixture
def streamed(make_tokenizer: Any) -> Any:
    """streamed(source, window, **settings): a stream, and the steps that a run makes of it."""

    def make(source: Any, window: int = 5, *, seed: int = 0, shuffle: bool = True, **settings: Any):
        reading = {"format": "chat", "tokenizer": make_tokenizer(), "max_length": 120, **settings}
        return Stream(source, window=window, seed=seed, shuffle=shuffle, **reading)

    return make


@pytest.fixture
def whole(make_tokenizer: Any) -> Any:
    def make(source: Any) -> Any:
        reading: dict[str, Any] = {"format": "chat", "tokenizer": make_tokenizer()}
        return load_examples(source, key="data.train", max_length=120, **reading)

    return make


def steps_of(stream: Stream, size: int, steps: int) -> list[list[int]]:
    sampler = StreamSampler(stream, size, max_steps=steps)
    return [sampler.step(t) for t in range(steps)]


def test_windows_hold_the_records_in_the_order_of_the_file(
    streamed: Any, whole: Any, jsonl: Any
) -> None:
    """Each window has its own sequences, shuffled, with the content of a data set's."""
    path = jsonl(*map(record, range(40)))
    data = whole(path)
    assert data.report.dropped == 6
    stream = streamed(path)
    sampler = StreamSampler(stream, 3, epochs=2)
    assert sampler.total_steps == -(-2 * len(data) // 3)
    ids: list[int] = []
    for t in range(sampler.total_steps):
        for i in sampler.step(t):
            assert stream[i].id == i and stream.lengths[i] == len(data[i])
            assert stream[i].input_ids.tolist() == data[i].input_ids.tolist()
            assert stream[i].labels.tolist() == data[i].labels.tolist()
            ids.append(i)
    epochs = ids[: len(data)], ids[len(data) :]
    for order in epochs:
        windows = [order[i : i + 5] for i in range(0, len(order), 5)]
        assert [sorted(w) for w in windows] == [
            list(range(i, min(i + 5, len(data)))) for i in range(0, len(data), 5)
        ]
        assert order != sorted(order)
    assert epochs[0] != epochs[1]
    assert str(stream.report) == str(data.report)


def test_a_window_over_everything_and_no_shuffling(streamed: Any, whole: Any, jsonl: Any) -> None:
    path = jsonl(*map(record, range(20)))
    count = len(whole(path))
    [order] = steps_of(streamed(path, 1000), count, 1)
    assert sorted(order) == list(range(count)) != order
    sampler = Sampler(count, 4, 0, False, max_steps=12)
    assert steps_of(streamed(path, shuffle=False), 4, 12) == [sampler.step(t) for t in range(12)]


def test_any_step_is_reached_from_anywhere(streamed: Any, jsonl: Any) -> None:
    """As a resumed run does: steps back, far on, and over the ends of epochs."""
    path = jsonl(*map(record, range(23)))
    wanted = steps_of(streamed(path), 4, 30)
    sampler = StreamSampler(streamed(path), 4, max_steps=30)
    for t in (17, 3, 29, 0, 1, 2, 3, 4, 16):
        assert sampler.step(t) == wanted[t]
    for t in (7, 8, 29):
        assert StreamSampler(streamed(path), 4, epochs=6).step(t) == wanted[t]
    other = steps_of(streamed(path, seed=1), 4, 30)
    assert other != wanted and other == steps_of(streamed(path, seed=1), 4, 30)


def test_weights_over_several_files(streamed: Any, jsonl: Any) -> None:
    first = jsonl(*({**record(0), "n": i} for i in range(10)), name="a.jsonl")
    second = jsonl(*({**record(1), "n": i} for i in range(12)), name="b.jsonl")
    source = [{"path": first, "weight": 2}, {"path": second, "weight": 0.25}]
    stream = streamed(source, 4)
    assert stream.count() == 23
    sampler = StreamSampler(stream, 23, max_steps=3)
    epochs = [Counter(sampler.step(t)) for t in range(3)]
    for shows in epochs:
        assert [shows[i] for i in range(10)] == [2] * 10
        assert sum(shows[i] for i in range(10, 22)) == 3
        assert max(shows[i] for i in range(10, 22)) == 1
    assert epochs[0] != epochs[1] or epochs[1] != epochs[2]


def test_the_fingerprint_is_that_of_content_and_order(streamed: Any, jsonl: Any) -> None:
    records = [record(i) for i in range(12)]
    one = streamed(jsonl(*records)).fingerprint
    assert one == streamed(jsonl(*records, name="other.jsonl")).fingerprint
    late = jsonl(*records[:11], record(99), name="late.jsonl")  # behind the first window
    others = [
        streamed(late).fingerprint,
        streamed(jsonl(*records), 6).fingerprint,
        streamed(jsonl(*records), max_length=60).fingerprint,
        streamed([{"path": jsonl(*records), "weight": 2}]).fingerprint,
    ]
    assert len({one, *others}) == 5


def test_a_bad_record_is_refused_where_it_is_read(streamed: Any, jsonl: Any) -> None:
    records: list[Any] = [record(0) for _ in range(1200)]
    path = jsonl(*records, {"messages": []})
    sampler = StreamSampler(streamed(path), 600, max_steps=3)  # the first window is right
    sampler.step(0)
    assert f"{path}:1201: 'messages' is empty" in refusal(lambda: [sampler.step(t) for t in (1, 2)])
    assert ":1201: " in refusal(lambda: StreamSampler(streamed(path), 1, epochs=1))
    assert ":1: " in refusal(streamed, jsonl({"messages": []}, *records))
    skipping = streamed(path, on_error="skip")
    steps_of(skipping, 600, 2)
    assert skipping.count() == 1200 and skipping.report.skipped == 1


def test_limits_are_checked_in_every_window(streamed: Any, jsonl: Any) -> None:
    def check(largest: int, longest: int) -> None:
        seen.append((largest, longest))

    stream, seen = streamed(jsonl(*map(record, range(20)))), list[tuple[int, int]]()
    stream.check = check
    steps_of(stream, 17, 1)
    assert len(seen) == 4 and all(stream.largest_id <= max(seen)[0] for _ in seen)


def anonymous() -> int:
    """Bytes of this process that no file backs."""
    with open(f"/proc/{os.getpid()}/smaps_rollup") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith("Anonymous"))


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet"])
def test_memory_is_flat_over_a_file_larger_than_the_limit(
    name: str, streamed: Any, tmp_path: Path
) -> None:
    """120 MB are read through; what stays and what is in use at any step is below 40 MB."""
    limit, path, noise = 40 << 20, tmp_path / name, random.Random(0).randbytes(25_000).hex()
    rows = ({**record(i), "beside": noise[i % 99 :]} for i in range(2600))
    if name == "a.parquet":
        batches = (pyarrow.RecordBatch.from_pylist([row]) for row in rows)
        first = next(batches)
        plain: dict[str, Any] = {"use_dictionary": False, "compression": "none"}
        with pyarrow.parquet.ParquetWriter(path, first.schema, **plain) as writer:
            for batch in (first, *batches):
                writer.write_batch(batch, row_group_size=500)
    else:
        with path.open("w") as file:
            file.write("[" if name == "a.json" else "")
            for i, row in enumerate(rows):
                file.write((",\n" if i and name == "a.json" else "") + json.dumps(row))
                file.write("\n" if name == "a.jsonl" else "")
            file.write("]" if name == "a.json" else "")
    assert path.stat().st_size > 2.8 * limit
    stream = streamed(str(path), 50)
    sampler = StreamSampler(stream, 100, max_steps=22)
    sampler.step(0)
    gc.collect()
    before, most = anonymous(), 0
    for t in range(1, 22):
        sampler.step(t)
        most = max(most, anonymous() - before)
    assert stream.report.records > 2500
    assert most < limit
