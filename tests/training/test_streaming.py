"""Runs on all kinds of files and on a stream: the same on any number of ranks, and resumed."""

import functools
import json
from pathlib import Path
from typing import Any

import datasets
import pandas
import pyarrow
import pyarrow.parquet
import pytest
from refusals import preparation, refusal
from run_training import Runs, check_near, told
from stopped_runs import check_equal, crashed

STEPS, SAVED, CRASHED = 6, 2, 6
TEXTS = [{"text": f"{'many ' * (i % 9)}words, {i}"} for i in range(30)]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The same texts in one file of JSON lines, and five by five in files of six kinds."""
    root = tmp_path_factory.mktemp("files")
    lines = [json.dumps(text) + "\n" for text in TEXTS]
    (root / "whole.jsonl").write_text("".join(lines))
    pieces = [TEXTS[i : i + 5] for i in range(0, 30, 5)]
    (root / "0.jsonl").write_text("".join(lines[:5]))
    (root / "1.json").write_text(json.dumps(pieces[1], indent=1))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(pieces[2]), root / "2.parquet")
    pandas.DataFrame(pieces[3]).to_csv(root / "3.csv.gz", index=False)
    datasets.Dataset.from_list(pieces[4]).save_to_disk(root / "4")
    pandas.DataFrame(pieces[5]).to_json(root / "5.jsonl.zst", orient="records", lines=True)
    kinds = [
        str(root / name)
        for name in ["0.jsonl", "1.json", "2.parquet", "3.csv.gz", "4", "5.jsonl.zst"]
    ]
    return {"whole": str(root / "whole.jsonl"), "kinds": kinds}


@pytest.fixture(scope="module")
def command(words: Any, files: dict[str, Any]) -> Any:
    common = {"data__format": "text", "data__train": files["whole"], "output__save_every": SAVED}
    return functools.partial(words, train__max_steps=STEPS, **common)


STREAMED: dict[str, Any] = {"data__streaming": True, "data__shuffle_window": 8}


def test_all_kinds_in_one_run_on_two_ranks(run: Runs, files: dict[str, Any]) -> None:
    """Equal `batch_hash`, loss and adapters to the same records as JSON lines in one process."""
    check_near(run("kinds", 2, data__train=files["kinds"]), run("lines", 1))


def test_a_streamed_run_on_two_ranks(run: Runs, files: dict[str, Any]) -> None:
    check_near(run("kinds", 2, data__train=files["kinds"], **STREAMED), run("one", 1, **STREAMED))


def test_a_streamed_run_resumes_bit_for_bit(
    run: Runs, pools: Any, command: Any, files: dict[str, Any], tmp_path: Path
) -> None:
    """It reads on to its position, which is in its second epoch, with weights."""
    settings = STREAMED | {"data__train": {"path": files["whole"], "weight": 0.8}}
    whole = run("whole", 2, **settings)
    assert pools(2).run(crashed, command(tmp_path / "run", **settings), CRASHED) == ["crashed"] * 2
    check_equal(run("run", 2, **settings), whole)


def test_epochs_are_counted_and_what_was_read_is_said(run: Runs) -> None:
    settings = {"train__max_steps": None, "train__epochs": 2, **STREAMED}
    [(result, said)], lines = run("run", 1, work=told, **settings)
    assert result["status"] == 0 and len(lines) == -(-2 * len(TEXTS) // 7)
    assert "train: 9 optimizer steps of 7 sequences, the last of only 4" in said
    assert (
        "30 records: 30 kept" in said and "counted in a pass of its own, for train.epochs" in said
    )
    assert "data.train: epoch 1: 30 records: 30 kept" in said


def test_other_data_and_another_order_are_refused_at_a_resume(
    run: Runs, command: Any, tmp_path: Path, files: dict[str, Any]
) -> None:
    run("run", 1, **STREAMED)
    words = functools.partial(command, tmp_path / "run", train__max_steps=9)
    assert "data.streaming was True and is False" in refusal(preparation, words())
    other = STREAMED | {"data__shuffle_window": 9}
    assert "data.shuffle_window was 8 and is 9" in refusal(preparation, words(**other))
    changed = tmp_path / "changed.jsonl"
    changed.write_text(Path(files["whole"]).read_text()[:-30] + "\n")
    said = refusal(preparation, words(data__train=str(changed), **STREAMED))
    assert "data.train contains other sequences" in said or ":30: " in said
    weighted = [{"path": files["whole"], "weight": 2}]
    said = refusal(preparation, words(data__train=weighted, **STREAMED))
    assert "data.train contains other sequences" in said
    preparation(words(**STREAMED))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"data__shuffle_window": 8}, "data.shuffle_window: 8 cannot act: data.streaming is not"),
        ({"data__shuffle": False, **STREAMED}, "data.shuffle_window: 8 cannot act: data.shuffle"),
        (
            {"data__streaming": True, "data__cache_dir": "c"},
            "data.cache_dir: 'c' cannot act: data.streaming reads",
        ),
        (
            {"data__streaming": True, "data__train": "builtin:docstrings", "data__format": "chat"},
            "data.streaming: true cannot act: a builtin data set is in memory anyway",
        ),
        (
            {"data__train": {"path": "x.jsonl", "weight": "much"}},
            "data.train: x.jsonl: weight must be a number > 0, got 'much'",
        ),
    ],
)
def test_settings_that_cannot_act(
    settings: dict[str, Any], expected: str, command: Any, tmp_path: Path
) -> None:
    assert expected in refusal(preparation, command(tmp_path / "run", **settings))
