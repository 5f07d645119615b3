"""Which architectures compute sequences that share a row exactly: what a run says, and a table."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from dlora.objectives.packable import TYPES

from .architectures import Architecture, architectures
from .cells import YES, Cell
from .packing import PAGE, measured, page, types_of

SAMPLE = {
    "llama": "plain",
    "gpt2": "learned positions",
    "gemma2": "no SDPA: soft caps; windows",
    "gpt_oss": "sinks, windows, experts",
    "llama4_text": "chunks of tokens",
    "qwen2_vl": "composite, positions in three rows",
    "jamba": "Mamba",
    "qwen3_next": "linear attention",
    "lfm2": "convolutions",
    "bloom": "attention of its own, biased by position",
    "bart": "positions of its own",
    "deepseek_v32": "masks of its own",
}


def check(some: Sequence[Architecture]) -> dict[Architecture, tuple[Cell, str, str]]:
    """Nothing packs that is not exact, and what is exact is known."""
    rows = dict(measured(some))
    good, wrong = types_of(rows.values())
    assert not good - TYPES and not wrong & TYPES
    for cell, kind, said in rows.values():
        assert said or cell == YES, (kind, cell)
    return rows


def test_a_sample_packs_exactly_or_says_why_not() -> None:
    rows = check([a for a in architectures() if a.model_type in SAMPLE])
    said = {a.model_type: reason for a, (_, _, reason) in rows.items()}
    assert said.keys() == SAMPLE.keys()
    names = ("llama", "gpt2", "gemma2", "gpt_oss", "llama4_text", "qwen2_vl")
    assert {name for name, reason in said.items() if not reason} == {*names}
    assert "is not among the architectures that pack" in said["jamba"]


def marks(text: str) -> list[list[str]]:
    """Class, type and mark of each row; a loss in a reason is of one machine's rounding."""
    return [line.split(" | ")[:3] for line in text.splitlines() if line.startswith("| ")]


# Five minutes.
@pytest.mark.full
@pytest.mark.timeout(3600)
def test_every_architecture_packs_exactly_or_says_why_not() -> None:
    rows = check(architectures())
    assert marks(page(rows)) == marks(PAGE.read_text(encoding="utf-8")), "make packing-table"
    good, _ = types_of(rows.values())
    assert not TYPES - good
