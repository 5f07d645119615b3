"""What a run shows of its steps off a terminal: few lines, with both rates and the time left."""

import pytest

from dlora.metrics import progress
from dlora.metrics.progress import StepDisplay, clock


def test_a_line_every_few_seconds_and_for_what_counts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """20 steps of 2 s: the first, then every 3rd, an evaluated one, and the last."""
    now = 100.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    figures = {
        "loss": 1.5,
        "tokens_per_second": 1000.0,
        "all_tokens_per_second": 3000.0,
        "peak_memory_bytes": 7_000_000,
    }
    display = StepDisplay(20, 0, enabled=True)
    for step in range(1, 21):
        now += 2
        display.update(figures | {"step": step} | ({"eval_loss": 1.25} if step == 6 else {}))
    lines = capsys.readouterr().out.splitlines()
    steps = [int(line.split("/")[0].removeprefix("step ")) for line in lines]
    assert steps == [1, 4, 6, 9, 12, 15, 18, 20]
    assert lines[0] == (
        "step 1/20  loss 1.5000  1,000 target tokens/s  3,000 tokens/s in all  7 MB  0:38 left"
    )
    assert "held-out 1.2500" in lines[2]
    assert lines[-1].endswith("0:00 left")


def test_other_ranks_are_silent(capsys: pytest.CaptureFixture[str]) -> None:
    with StepDisplay(1, 0, enabled=False) as display:
        display.update(
            {"step": 1, "loss": 1.0, "peak_memory_bytes": 0}
            | dict.fromkeys(("tokens_per_second", "all_tokens_per_second"), 1.0)
        )
    assert capsys.readouterr().out == ""


def test_time_left_is_shown_as_a_clock_would() -> None:
    assert [clock(s) for s in (0, 59.6, 3599, 3723)] == ["0:00", "1:00", "59:59", "1:02:03"]
