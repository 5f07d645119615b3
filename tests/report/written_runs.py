"""Directories of runs, written line by line as a run would, and the page on them, taken apart."""

import json
import random
import re
from collections import Counter
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import yaml

from dlora.report.page import page_of
from dlora.report.run_files import find_runs

VOID = {"meta", "link", "input", "br", "hr", "img"}
USUAL = {"loss": 2.0, "grad_norm": 1.0, "lr": 1e-4, "tokens": 1000, "all_tokens": 2000}
MEASURED = {
    "padding": 0.1,
    "step_seconds": 0.5,
    "tokens_per_second": 2000.0,
    "all_tokens_per_second": 4000.0,
    "all_tokens_per_second_per_device": 2000.0,
    "peak_memory_bytes": 1_500_000_000,
    "wire_bytes": 282_500_000,
    "mfu": 0.4,
}
OF_OBJECTIVES = {
    "rewards_chosen": 0.5,
    "rewards_rejected": -0.5,
    "margin": 1.0,
    "accuracy": 0.75,
    "kl": 0.01,
    "forget_kl": 0.02,
    "forget_nll": 2.5,
    "orth_loss": 1e-4,
    "aux_loss": 1.1,
    "budget": 2000,
    "kept_ranks": 2000,
    "what_nobody_knows/yet": -3.0,
}


def lines_of(steps: int, names: dict[str, float], seed: int = 0) -> list[dict[str, Any]]:
    """Lines of a log: the values of `names`, moved a little."""
    draw = random.Random(seed)
    return [
        {"step": step, "batch_hash": f"{step:064x}"}
        | {name: value * draw.uniform(0.9, 1.1) for name, value in names.items()}
        for step in range(1, steps + 1)
    ]


def write_run(
    directory: Path,
    lines: list[dict[str, Any]],
    *,
    config: dict[str, Any] | None = None,
    events: list[dict[str, Any]] = [],  # noqa: B006
    ranks: dict[int, dict[str, int]] | None = None,
) -> Path:
    """The directory of a run."""
    directory.mkdir(parents=True, exist_ok=True)
    put = directory / "metrics.jsonl"
    put.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    if events:
        text = "".join(f"{json.dumps(event)}\n" for event in events)
        (directory / "events.jsonl").write_text(text)
    if config is not None:
        (directory / "config.yaml").write_text(yaml.safe_dump(config))
    if ranks is not None:
        (directory / "ranks.json").write_text(json.dumps(ranks))
    return directory


def event(kind: str, step: int, **values: Any) -> dict[str, Any]:
    return {"event": kind, "time": 1764524400.0 + step, "step": step, **values}


@dataclass
class Element:
    tag: str
    attributes: dict[str, str]
    text: str = ""
    inside: list["Element"] = field(default_factory=list)

    def all(self, tag: str, name: str = "") -> list["Element"]:
        """What lies inside, by its tag and one of its classes."""
        found = []
        for one in self.inside:
            if one.tag == tag and (not name or name in one.attributes.get("class", "").split()):
                found.append(one)
            found += one.all(tag, name)
        return found

    @property
    def words(self) -> str:
        """All of its text."""
        return self.text + "".join(f" {one.words}" for one in self.inside)


class Taken(HTMLParser):
    """A page as a tree; every tag that is opened is closed, in order."""

    def __init__(self, page: bytes) -> None:
        super().__init__(convert_charrefs=True)
        self.root = Element("", {})
        self._open = [self.root]
        self.feed(page.decode("utf-8"))
        self.close()
        assert len(self._open) == 1, self._open[-1]

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        assert len(dict(attrs)) == len(attrs), f"{tag} has an attribute twice"
        made = Element(tag, {name: value or "" for name, value in attrs})
        self._open[-1].inside.append(made)
        if tag not in VOID:
            self._open.append(made)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self._open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop().tag == tag, tag

    def handle_data(self, data: str) -> None:
        self._open[-1].text += data


@dataclass
class ReportPage:
    """The page on some runs."""

    bytes: bytes
    tree: Element
    data: dict[str, Any]

    @property
    def charts(self) -> dict[str, tuple[Element, dict[str, Any]]]:
        """By its title: what is drawn, and what hovering shows."""
        figures = self.tree.all("figure", "chart")
        assert len(figures) == len(self.data["charts"])
        titles = [figure.all("figcaption")[0].all("b")[0].text for figure in figures]
        assert not [title for title, count in Counter(titles).items() if count > 1]
        pairs = zip(figures, self.data["charts"], strict=True)
        return dict(zip(titles, pairs, strict=True))

    def section(self, id_: str) -> Element:
        """By its id."""
        (found,) = [s for s in self.tree.all("section") if s.attributes["id"] == id_]
        return found


def taken_apart(content: bytes) -> ReportPage:
    tree = Taken(content).root
    scripts = tree.all("script")
    assert [s.attributes.get("type") for s in scripts] == ["application/json", None]
    return ReportPage(content, tree, json.loads(scripts[0].text))


def report_on(*directories: Path) -> ReportPage:
    return taken_apart(page_of(find_runs([str(one) for one in directories])))


def points(path: str) -> list[tuple[float, float]]:
    """The corners of a path."""
    return [(float(x), float(y)) for x, y in re.findall(r"[ML](-?[\d.e+-]+) (-?[\d.e+-]+)", path)]
