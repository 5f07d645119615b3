"""The closing line on the held-out loss."""

import json
from pathlib import Path

import pytest

from dlora.metrics.log import held_out_line


@pytest.mark.parametrize(
    ("losses", "line"),
    [
        ([4.0, 2.0], "held-out loss: 4.0000 before, 2.0000 after (-50.0%)"),
        ([0.0, 0.0], "held-out loss: 0.0000 before, 0.0000 after"),
        ([4.0], None),
    ],
)
def test_held_out_line(tmp_path: Path, losses: list[float], line: str | None) -> None:
    records = [{"step": step, "eval_loss": loss} for step, loss in enumerate(losses)]
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(r)}\n" for r in records))
    assert held_out_line(tmp_path) == line
