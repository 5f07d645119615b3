"""The page: one file of HTML with its style, its script and its data inside; it loads nothing.

What comes from a run's files is escaped where the template writes it, and the page's own policy
(Content-Security-Policy) lets no script run but the one whose hash it names.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from dlora.errors import and_more
from dlora.io.files import write_atomically
from dlora.report import tables
from dlora.report.chart import COLOURS, HEIGHT, WIDTH
from dlora.report.happened import MOST_EVENTS, MOST_SAMPLES, events_of, samples_of
from dlora.report.rank_grid import LEVELS, RankGrid, grids_of
from dlora.report.run_files import RunFiles, read_run
from dlora.report.views import Charts, charts_of

HERE = Path(__file__).parent
REPORT = "report.html"
# Characters that HTML has no place for, as an untrained model writes them, by their pictures.
CONTROLS = {c: 0x2400 + c for c in range(32) if chr(c) not in "\t\n\r"}
CONTROLS |= dict.fromkeys(range(0x7F, 0xA0), 0xFFFD)


def write_report(directory: Path) -> Path:
    """Write `report.html` of the run in a directory there; returns its path.

    Raises:
        OSError, UsageError: it cannot be written, or what it shows cannot be read.
    """
    write_atomically(directory / REPORT, page_of(read_run(directory)))
    return directory / REPORT


def page_of(runs: Sequence[RunFiles]) -> bytes:
    """The page on some runs, in UTF-8."""
    heading = _heading(runs)
    charts, grids = charts_of(runs), grids_of(runs)
    events, samples = events_of(runs), samples_of(runs)
    script = (HERE / "page.js").read_text("utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    environment = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found = {
        "title": f"dlora report: {heading}",
        "heading": heading,
        "runs": runs,
        "overview": tables.overview(runs),
        "notes": [note for run in runs for note in run.notes],
        "settings": tables.settings(runs),
        "charts": charts,
        "plan": tables.against_plan(runs),
        "grids": grids,
        "samples": samples[:MOST_SAMPLES],
        "samples_left": max(0, len(samples) - MOST_SAMPLES),
        "events": events[:MOST_EVENTS],
        "events_left": max(0, len(events) - MOST_EVENTS),
        "figures": list(tables.figures(runs)),
        "texts": list(dict.fromkeys(name for run in runs for name in run.texts)),
        "colours": COLOURS,
        "levels": LEVELS,
        "width": WIDTH,
        "height": HEIGHT,
        "style": Markup((HERE / "page.css").read_text("utf-8")),
        "script": Markup(script),
        "script_hash": f"sha256-{digest}",
        "data": Markup(in_script(_data(charts, grids))),
    }
    found["contents"] = _contents(found)
    text = environment.get_template("page.html.j2").render(found).translate(CONTROLS)
    # A name of a file may hold bytes, and a text of JSON halves of characters, that UTF-8 has not.
    return text.encode("utf-8", "replace")


def _heading(runs: Sequence[RunFiles]) -> str:
    """The names of the runs; of the adapters of one run its own before them."""
    names = and_more([run.name for run in runs], 4)
    groups = {run.group for run in runs}
    group = groups.pop() if len(groups) == 1 else None
    return names if group is None else f"{group.absolute().name}: {names}"


def _data(charts: Charts, grids: Sequence[RankGrid]) -> dict[str, Any]:
    """What the script reads."""
    return {
        "width": WIDTH,
        "charts": [chart.hover() for chart in charts.all],
        "ranks": [
            {"grid": grid.hover(), "bands": [bands.hover() for bands in grid.bands()]}
            for grid in grids
        ],
    }


def in_script(value: Any) -> str:
    """JSON that no HTML parser finds an end of a script in."""
    text = json.dumps(value, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _contents(found: dict[str, Any]) -> list[tuple[str, str]]:
    """(id, name) of the sections that there are."""
    charts = [(f"charts-{i}", name) for i, name in enumerate(found["charts"].sections, 1)]
    more = [("plan", "Against the plan"), ("ranks", "Ranks"), ("samples", "Samples")]
    there = {"plan": "plan", "ranks": "grids", "samples": "samples"}
    return [
        ("overview", "Overview"),
        ("settings", "Configuration"),
        *charts,
        *((id_, name) for id_, name in more if found[there[id_]]),
        ("events", "Events"),
        ("figures", "All figures"),
    ]
