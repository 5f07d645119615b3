"""The page: nothing of a log is left out, extremes survive, and nothing of a file is obeyed."""

import base64
import hashlib
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from refusals import refusal
from written_runs import (
    MEASURED,
    OF_OBJECTIVES,
    USUAL,
    event,
    lines_of,
    points,
    report_on,
    taken_apart,
    write_run,
)

from dlora.report.command import main
from dlora.report.numbers import log_ticks, shown, ticks

ALL = USUAL | MEASURED | OF_OBJECTIVES | {"eval_loss": 2.1, "eval_perplexity": 8.0}
LAYERS = [f"model.layers.{i}.self_attn.{k}_proj" for i in range(3) for k in "qkvo"]
HOSTILE = "</script><script>window.pwned=1</script><img src=x onerror=window.pwned=1>\"'`&<!--"


def test_every_figure_has_a_chart_with_its_values(tmp_path: Path) -> None:
    lines = lines_of(30, ALL)
    page = report_on(write_run(tmp_path / "run", lines))
    drawn: dict[str, dict[str, Any]] = {}
    for title, (figure, data) in page.charts.items():
        paths = [p.attributes["d"] for p in figure.all("path", "mean")]
        assert len(paths) == len(data["lines"])
        labels = [line["label"] for line in data["lines"]]
        assert len(labels) == len({*labels, *drawn.keys()}) - len(drawn), title
        for line, path in zip(data["lines"], paths, strict=True):
            drawn[line["label"]] = line
            assert len(points(path)) == 30
            heights = [y for _, y in points(path)]
            values = [record[line["label"]] for record in lines]
            # the higher the value, the nearer to the top
            order = np.argsort(values, kind="stable")
            assert (np.diff(np.array(heights)[order]) <= 0.1).all(), line["label"]
            assert 0 <= min(heights) <= max(heights) <= 300
    assert drawn.keys() == ALL.keys()
    for record, text in zip(lines, drawn["loss"]["text"], strict=True):
        assert float(text) == pytest.approx(record["loss"], rel=1e-3)
    without = page.section("figures").all("p")[0]
    assert [code.text for code in without.all("code")] == ["batch_hash"]


def test_what_belongs_together_shares_a_chart(tmp_path: Path) -> None:
    charts = report_on(write_run(tmp_path / "run", lines_of(3, ALL))).charts
    shared = [[line["label"] for line in data["lines"]] for _, data in charts.values()]
    for names in (
        ["loss", "eval_loss"],
        ["rewards_chosen", "rewards_rejected"],
        ["budget", "kept_ranks"],
        ["tokens_per_second", "all_tokens_per_second"],
        ["what_nobody_knows/yet"],
    ):
        assert names in shared


def test_long_logs_keep_their_extremes(tmp_path: Path) -> None:
    """Against numpy's minimum, maximum and mean of the steps that share a column."""
    draw = np.random.default_rng(0)
    values = draw.normal(1.0, 0.1, 5000)
    values[1234], values[4321] = 40.0, -7.0
    lines = [{"step": i + 1, "grad_norm": v} for i, v in enumerate(values.tolist())]
    figure, data = report_on(write_run(tmp_path / "run", lines)).charts["Gradient norm"]
    (line,) = data["lines"]
    assert len(data["steps"]) == 400
    band = points(figure.all("path", "band")[0].attributes["d"])
    assert len(band) == 800
    heights = np.array([y for _, y in band])
    low, high = values.min(), values.max()
    pad = 0.04 * (high - low)
    scale = 300 / (high - low + 2 * pad)
    ends = [[int(n.replace(",", "")) for n in s.split(" to ")] for s in data["steps"]]
    assert [ends[0][0], ends[-1][1]] == [1, 5000]
    for place, (first, last) in enumerate(ends):
        inside = values[first - 1 : last]
        top, bottom = heights[place], heights[-1 - place]
        assert top == pytest.approx((high + pad - inside.max()) * scale, abs=0.06)
        assert bottom == pytest.approx((high + pad - inside.min()) * scale, abs=0.06)
        said = [float(n.replace(",", "")) for n in re.findall(r"-?[\d.,]+", line["text"][place])]
        found = [inside.mean(), inside.min(), inside.max()]
        assert said == pytest.approx(found, rel=1e-3, abs=1e-3)
    table = figure.all("table")[0].words
    assert "40" in table
    assert "-7" in table


def test_what_is_not_finite_is_a_gap_and_an_event(tmp_path: Path) -> None:
    lines = lines_of(9, {"loss": 1.0, "grad_norm": 1.0, "never": 1.0})
    lines[4]["loss"] = None
    for line in lines:
        line["never"] = None
    directory = write_run(tmp_path / "run", lines)
    with open(directory / "metrics.jsonl", "a") as file:  # as other programs write them
        file.write(
            '{"step": 10, "loss": NaN, "grad_norm": 1e999}\n{"step": 11, "loss": 1' + "0" * 400
        )
        file.write("}\n{torn")
    page = report_on(directory)
    figure, data = page.charts["Loss"]
    assert figure.all("path", "mean")[0].attributes["d"].count("M") == 2
    assert [i for i, text in enumerate(data["lines"][0]["text"]) if text == "not finite"] == [
        4,
        9,
        10,
    ]
    assert data["lines"][0]["y"][4] == -1
    assert "never" in page.charts
    words = page.section("events").words
    assert words.count("skipped") == 3
    assert "no finite value" in page.section("figures").words


def test_runs_side_by_side_say_what_differs(tmp_path: Path) -> None:
    for name, rate in (("a", 1e-4), ("b", 1e-3)):
        config = {
            "model": {"path": "base"},
            "optimizer": {"lr": rate},
            "train": {"max_steps": 5, "seed": 7},
            "of a later version": {"key": [1, {"x": None}]},
        }
        write_run(tmp_path / name, lines_of(5, USUAL, seed=ord(name)), config=config)
    page = report_on(tmp_path / "a", tmp_path / "b")
    differing, shared, _ = page.section("settings").all("table")
    rows = {row.all("code")[0].text: row for row in differing.all("tr") if row.all("code")}
    assert rows.keys() == {"optimizer.lr"}
    assert [cell.text for cell in rows["optimizer.lr"].all("td")] == ["0.0001", "0.001"]
    assert {c.text for c in shared.all("code")} == {
        "model.path",
        "train.max_steps",
        "train.seed",
        "of a later version.key",
    }
    _, data = page.charts["Loss"]
    assert [(line["label"], line["colour"]) for line in data["lines"]] == [("a", 0), ("b", 1)]


def test_adapters_of_one_run_are_runs_of_the_page(tmp_path: Path) -> None:
    run = tmp_path / "run"
    for name in ("one", "two"):
        own = [event("sample", 0, when="before training", prompt="p", wanted="w", answer=name)]
        write_run(run / "adapters" / name, lines_of(4, USUAL | MEASURED), events=own)
    planned = {"peak": 2e9, "base": 1e9, "replica": 1e8, "wire": 3e8}
    started = event("start", 0, steps=4, adapters={"one": 4, "two": 4}, ranks=2, planned=planned)
    (run / "events.jsonl").write_text(
        "".join(f"{json.dumps(e)}\n" for e in (started, event("finished", 4)))
    )
    page = report_on(run)
    heads = [th.text for th in page.section("overview").all("thead")[0].all("th")]
    assert heads == ["one", "two"]
    rows = page.section("events").all("tbody")[0].all("tr")
    assert len(rows) == 2  # once for both
    assert [line["label"] for line in page.charts["Loss"][1]["lines"]] == ["one", "two"]
    assert len(page.section("samples").all("article")) == 2
    assert "planned: 2 GB" in page.charts["Peak memory"][0].words
    assert page.tree.all("h1")[0].text == "run: one, two"
    assert {tr.all("th")[0].text for tr in rows} == {"run"}


def test_memory_samples_events_and_ranks(tmp_path: Path) -> None:
    planned = {"peak": 2e9, "base": 1e9, "replica": 1e8, "wire": 3e8}
    measured = {"peak": 1.5e9, "base": 1e9, "replica": 1.1e8, "wire": 3e8}
    asked = {"prompt": "def f():", "wanted": "the first sentence"}
    events = [
        event("start", 0, steps=8, ranks=2, nodes=1, device="cpu", planned=planned),
        event("sample", 0, when="before training", answer="something long", **asked),
        event("stopped", 4, cause="SIGTERM"),
        event("start", 4, steps=8, ranks=2, nodes=1, device="cpu", planned=planned),
        event("healed", 6, found="lora_A on rank 1"),
        event("what comes later", 7, reason="a"),
        event("sample", 8, when="after training", answer="the first", **asked),
        event("finished", 8, measured=measured),
    ]
    ranks = {s: {name: (7 * i + s) % 9 for i, name in enumerate(LAYERS)} for s in range(2, 7)}
    page = report_on(write_run(tmp_path / "run", lines_of(8, ALL), events=events, ranks=ranks))
    plan = [[c.words.strip() for c in r.all("td")] for r in page.section("plan").all("tr")][1:]
    assert [row[:2] for row in plan] == [
        ["2 GB", "1.5 GB"],
        ["1 GB", "1 GB"],
        ["100 MB", "110 MB"],
        ["300 MB", "300 MB"],
    ]
    assert [row[2].split()[-1] for row in plan] == ["0.750", "1.000", "1.100", "1.000"]
    assert "planned: 2 GB" in page.charts["Peak memory"][0].words
    (sample,) = page.section("samples").all("article")
    assert [dd.text for dd in sample.all("dd")] == [
        "the first sentence",
        "something long",
        "the first",
    ]
    kinds = [row.all("b")[0].text for row in page.section("events").all("tbody")[0].all("tr")]
    assert kinds == ["start", "stopped", "restart", "healed", "what comes later", "finished"]
    notes = page.charts["Loss"][1]["notes"]
    assert notes == {"3": "stopped; restarted", "5": "healed", "6": "what comes later"}
    # the grid: the last mask in the table, every mask for the script, by layer and by kind
    heat = page.section("ranks").all("table", "heat")[0]
    last = [[int(td.text) for td in tr.all("td")] for tr in heat.all("tbody")[0].all("tr")]
    wanted = [[ranks[6][f"model.layers.{i}.self_attn.{k}_proj"] for i in range(3)] for k in "qkvo"]
    assert last == wanted
    grid = page.data["ranks"][0]["grid"]["ranks"]
    assert grid[-1] == [rank for row in wanted for rank in row]
    by_layer, by_kind = page.data["ranks"][0]["bands"]
    assert [float(row[-1]) for row in by_layer["text"]] == pytest.approx(
        np.mean(wanted, axis=0), abs=0.006
    )
    assert [float(row[-1]) for row in by_kind["text"]] == pytest.approx(
        np.mean(wanted, axis=1), abs=0.006
    )


def test_nothing_of_a_file_is_obeyed(tmp_path: Path) -> None:
    """Markup in every text that the page shows, and in the name of the run."""
    run = tmp_path / HOSTILE.replace("/", "∕")
    lines = [line | {HOSTILE: 1.0, "note": HOSTILE} for line in lines_of(4, USUAL)]
    events = [
        event("start", 0, steps=HOSTILE, ranks=HOSTILE, device=HOSTILE, planned={"peak": HOSTILE}),
        event(HOSTILE, 2, **{HOSTILE: HOSTILE}),
        event("sample", 0, when=HOSTILE, prompt=HOSTILE, wanted=HOSTILE, answer=HOSTILE),
        event("sample", 0, when=None, prompt="\ud800\x00\x1b[31m", wanted=[1], answer={"a": 1}),
        {"event": "finished", "time": 1e400, "step": -1, "measured": [HOSTILE]},
    ]
    config = {"model": {"path": HOSTILE, HOSTILE: [HOSTILE]}, HOSTILE: HOSTILE}
    ranks = {1: {f"model.layers.0.{HOSTILE}": 3}}
    page = report_on(write_run(run, lines, events=events, config=config, ranks=ranks))
    assert b"\x00" not in page.bytes
    assert b"\x1b" not in page.bytes
    everything = page.tree.all
    assert not everything("img")
    assert not everything("iframe")
    names = ("div", "span", "td", "th", "code", "figure", "svg", "path", "button", "title", "pre")
    for element in (e for name in names for e in everything(name)):
        assert not [a for a in element.attributes if a.startswith("on")], element
    assert run.name in page.tree.all("h1")[0].words
    assert HOSTILE in page.section("samples").words
    assert HOSTILE in [line["label"] for _, d in page.charts.values() for line in d["lines"]]


def test_the_page_asks_for_nothing_and_runs_one_script(tmp_path: Path) -> None:
    page = report_on(write_run(tmp_path / "run", lines_of(4, ALL)))
    for element in page.tree.all("a"):
        assert element.attributes["href"].startswith("#")
        assert page.section(element.attributes["href"][1:])
    assert [link.attributes["href"] for link in page.tree.all("link")] == ["data:,"]
    style, script = page.tree.all("style")[0].text, page.tree.all("script")[1].text
    assert not re.search(r"url\(|@import|https?:", style + script)
    policy = next(m for m in page.tree.all("meta") if "http-equiv" in m.attributes)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy.attributes["content"]
    assert policy.attributes["content"].startswith("default-src 'none'")
    for svg in page.tree.all("svg"):
        assert len(svg.attributes["aria-label"]) > 20  # says what is drawn


def test_files_that_are_not_whole_are_noted(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", lines_of(3, USUAL))
    (run / "config.yaml").write_text("model: {path: a\nb")
    (run / "ranks.json").write_text('{"1": [2]}')
    (run / "events.jsonl").write_bytes(b'\xff\xfe\n[1]\n{"event": 3}\n{"event": "x"}\nnull\n')
    words = report_on(run).section("overview").words
    assert "config.yaml:2: not valid YAML" in words
    assert "ranks.json: cannot be read" in words
    empty = report_on(write_run(tmp_path / "empty", []))
    assert "The log has no figures" in empty.section("overview").words
    assert not empty.charts


def test_a_small_file_cannot_make_a_large_page(tmp_path: Path) -> None:
    """YAML's aliases, long texts, and very many figures."""
    run = write_run(tmp_path / "run", [{"step": 1, "text": "x" * 100_000}])
    bomb = "a: &a [1,1,1,1,1,1,1,1]\n" + "".join(
        f"{b}: &{b} [{','.join([f'*{a}'] * 8)}]\n"
        for a, b in zip("abcdefgh", "bcdefghi", strict=True)
    )
    (run / "config.yaml").write_text(bomb)
    many = {f"n{i}/{j}": 1.0 for i in range(20) for j in range(12)}
    with open(run / "metrics.jsonl", "a") as file:
        for offset in range(0, 400, 200):
            record = {"step": 2} | {f"{name}+{offset}": v for name, v in many.items()}
            file.write(json.dumps(record) + "\n")
    page = report_on(run)
    assert len(page.bytes) < 1_500_000
    assert len(page.charts) == 300
    assert "Without a chart, since there are too many: " in page.section("figures").words


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nowhere", "--to", "x.html"], "RUN: nowhere: there is no such directory"),
        ([".", "--to", "x.html"], "no run has logged a step there"),
        (["run", "run", "--to", "x.html"], "is given twice"),
        (["run", "--to", "x.pdf"], "--to: x.pdf: name a file that ends in .html"),
        (["run", "--to", "run.html"], "--to: run.html is a directory"),
        (["run", "--to", "not/there.html"], "there is no directory not"),
        (["run"], "--to"),
        (["--to", "x.html"], "RUN"),
        (["a\0b", "--to", "x.html"], "is no path"),
    ],
)
def test_refusals(
    words: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_run(tmp_path / "run", lines_of(1, USUAL))
    (tmp_path / "run.html").mkdir()
    monkeypatch.chdir(tmp_path)
    assert said in refusal(lambda: main(words))
    assert not (tmp_path / "x.html").exists()


def test_the_command_writes_the_page_without_torch(tmp_path: Path) -> None:
    write_run(tmp_path / "run", lines_of(3, ALL))
    program = (
        "import sys; from dlora.__main__ import run; "
        "status = run(['report', 'run', '--to', 'a.html']); "
        "print(status, sorted({'torch', 'transformers', 'matplotlib'} & sys.modules.keys()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        capture_output=True,
        text=True,
    )
    assert done.stdout.splitlines()[-1] == "0 []", done.stderr
    assert taken_apart((tmp_path / "a.html").read_bytes()).charts


def test_numbers_and_ticks_are_readable() -> None:
    written = [0.0, 1.0, 1234.5, 0.000123, 12345678.0, 2e-4, -0.5, 1e300, math.nan, 3.14159]
    assert [shown(v) for v in written] == [
        "0", "1", "1,234", "1.23e-4", "12,345,678", "2e-4", "-0.5000", "1e300", "–", "3.142",
    ]  # fmt: skip
    assert [shown(v, "bytes") for v in (12, 1.5e9, 282.5e6)] == ["12 B", "1.5 GB", "282.5 MB"]
    for low, high in ((0, 1), (-3.7, 12.2), (1e-9, 3e-9), (0, 1e300), (5, 5), (1e16, 1e16 + 2)):
        marks = ticks(low, high)
        assert 1 <= len(marks) <= 7
        assert all(low - 1e-9 * abs(low) <= m <= high * (1 + 1e-9) or low == high for m in marks)
    assert log_ticks(1e-3, 1e3)[0] == pytest.approx(1e-3)
