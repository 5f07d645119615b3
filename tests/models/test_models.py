"""The table of docs/models.md: a sample of its rows, each of a kind of its own, and all of them."""

from collections.abc import Iterator

import pytest

from .architectures import Architecture, architectures
from .columns import COLUMNS
from .page import Row, page, rows_of, share
from .table import PAGE, Workers

SAMPLE = {
    "llama": "plain",
    "gpt2": "Conv1D, learned positions, dropout in the base",
    "qwen3_moe": "stacked experts",
    "jamba": "hybrid: Mamba, attention, experts; a parent that reads a layer's weight",
    "deepseek_v3": "low-rank attention, experts, a tensor that stays float32",
    "bloom": "no SDPA; keys of its files without a prefix",
    "gemma3": "composite: text and vision",
    "gemma2": "a scaled embedding, soft caps, tied weights",
    "falcon_h1": "a buffer that no file has, an infinite number in the configuration",
    "hrm_text": "rows that are made of parts of the stored ones",
    "ernie4_5_moe": "dense layers of a name that PEFT gives to experts",
    "diffllama": "draws random numbers while it is made",
}
ENOUGH = 0.9


@pytest.fixture(scope="module")
def workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workers]:
    made = Workers(tmp_path_factory.mktemp("models"))
    yield made
    made.close()


def wrong(architecture: Architecture, row: Row) -> list[str]:
    """Cells that are neither ✓ nor have a reason that the command or the class gives."""
    return [
        f"{architecture.model_type}, {n}: {why}" for n, (mark, why) in row.items() if mark == "✗"
    ]


def test_a_sample_of_kinds_is_right_in_every_column(workers: Workers) -> None:
    sample = [a for a in architectures() if a.model_type in SAMPLE]
    assert len(sample) == len(SAMPLE)
    assert sum((wrong(*row) for row in workers.rows(sample)), []) == []


# All classes, twenty minutes on two quiet cores; the sample has one of each kind.
@pytest.mark.full
@pytest.mark.timeout(7200)
def test_nine_in_ten_classes_are_right_in_every_column(workers: Workers) -> None:
    rows = dict(workers.rows(architectures()))
    assert sum((wrong(*row) for row in rows.items()), []) == []
    for column in COLUMNS:
        good, possible = share(column, rows.values())
        assert good > 100 and good >= ENOUGH * possible, column


def test_the_page_has_these_columns_and_their_reasons() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert f"| class | type | {' | '.join(COLUMNS)} |" in text
    assert all(f"\n| {name} | " in text for name in COLUMNS)
    llama = next(a for a in architectures() if a.model_type == "llama")
    made = page({llama: dict.fromkeys(COLUMNS, ("refused", "a reason"))})
    assert rows_of(made) == {llama: dict.fromkeys(COLUMNS, ("refused", "a reason"))}
    assert f"| {llama.name} | llama | **no** 1 | **no** 1 |" in made and "\n1. a reason\n" in made
