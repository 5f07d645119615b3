"""The page in a headless Chromium: no complaint, no request, everything drawn, values on hover.

`full`: a browser is no Python package, and a machine with nothing but Python has none. `.ci/run`
installs Debian's and runs this file; without a browser it fails and says what to install.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import Browser
from test_page import ALL, HOSTILE, LAYERS
from written_runs import event, lines_of, write_run

from dlora.report.page import page_of
from dlora.report.run_files import find_runs

pytestmark = pytest.mark.full  # needs a browser, as said above

NAMES = ("one", "of several", "hostile")
DRAWN = """[...document.querySelectorAll(".mean, .bands path")].map(p => {
  const b = p.getBBox(); return [p.getTotalLength(), b.width, b.height]; })"""
# Relative luminance of a colour, and contrast, by WCAG 2.
CONTRAST = """(() => {
  const light = c => { const [r, g, b] = c.match(/[\\d.]+/g).map(v => v / 255).map(
    v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const behind = e => { const c = getComputedStyle(e).backgroundColor;
    return c === "rgba(0, 0, 0, 0)" && e.parentElement ? behind(e.parentElement) : c; };
  const lowest = {};
  for (const e of document.querySelectorAll("body *")) {
    if (![...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim())) continue;
    if (e.closest("svg, script, style, [hidden]")) continue;
    const [a, b] = [light(getComputedStyle(e).color), light(behind(e))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    const name = e.tagName + "." + e.className;
    lowest[name] = Math.min(lowest[name] ?? 99, ratio);
  }
  return lowest; })()"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    made = Browser()
    yield made
    made.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The page of a run, of two runs, and of a hostile one."""
    root = tmp_path_factory.mktemp("pages")
    events = [
        event("start", 0, steps=500, ranks=2, planned={"peak": 2e9, "wire": 3e8}),
        event("start", 40, steps=500, ranks=2, planned={"peak": 2e9, "wire": 3e8}),
        event("sample", 0, when="before", prompt="p " * 300, wanted="w" * 300, answer="a"),
    ]
    ranks = {s: {name: (5 * i + s) % 9 for i, name in enumerate(LAYERS)} for s in range(20)}
    config = {"model": {"path": "a-base/" + "x" * 80}, "train": {"max_steps": 500}}
    one = write_run(root / "one", lines_of(500, ALL), events=events, ranks=ranks, config=config)
    other = write_run(root / "other", lines_of(300, ALL, 1), config=config | {"seed": 1})
    bad = [event(HOSTILE, 1, x=HOSTILE), event("sample", 0, prompt=HOSTILE, answer=HOSTILE)]
    lines = [line | {HOSTILE: 1.0, "said": HOSTILE} for line in lines_of(5, ALL)]
    hostile = write_run(
        root / HOSTILE.replace("/", "∕"),
        lines,
        events=bad,
        config={HOSTILE: {HOSTILE: HOSTILE}},
        ranks={1: {HOSTILE: 3}},
    )
    found = {}
    for name, runs in zip(NAMES, ([one], [one, other], [hostile]), strict=True):
        found[name] = root / f"{name}.html"
        found[name].write_bytes(page_of(find_runs([str(run) for run in runs])))
    return found


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("screen", [(1280, False), (390, True), (320, True)])
@pytest.mark.parametrize("name", NAMES)
def test_the_page_is_drawn_on_every_screen(
    name: str, screen: tuple[int, bool], dark: bool, browser: Browser, pages: dict[str, Path]
) -> None:
    width, phone = screen
    page = browser.page(pages[name], width=width, phone=phone, dark=dark)
    assert page.complaints() == []
    assert page.requests() == [pages[name].as_uri()]
    drawn = page.value(DRAWN)
    assert len(drawn) >= len(ALL)
    assert all(length > 0 and w > 0 for length, w, _ in drawn)
    assert page.value("document.documentElement.scrollWidth") <= width
    contrast = page.value(CONTRAST)
    assert not {element: ratio for element, ratio in contrast.items() if ratio < 4.5}
    assert page.value("window.pwned === undefined")
    background = page.value("getComputedStyle(document.body).backgroundColor")
    assert background == ("rgb(18, 22, 28)" if dark else "rgb(246, 247, 249)")


@pytest.mark.parametrize("phone", [False, True])
def test_values_are_shown_under_mouse_and_finger(
    phone: bool, browser: Browser, pages: dict[str, Path]
) -> None:
    page = browser.page(pages["one"], width=390 if phone else 1280, phone=phone)
    data: dict[str, Any] = json.loads(page.value("document.getElementById('data').textContent"))
    for number in (0, 3, 10):
        chart = data["charts"][number]
        selector = f'.chart[data-chart="{number}"] .area'
        for share in (0.02, 0.5, 0.99):
            page.hover(selector, share)
            steps, *rows = page.value(
                f"[...document.querySelectorAll('{selector} .tip > *')].map(e => e.textContent)"
            )
            place = chart["steps"].index(steps.removeprefix("step "))
            assert abs(chart["x"][place] / data["width"] - share) < 0.02
            texts = [line["text"][place] for line in chart["lines"] if line["text"][place]]
            assert len(rows) >= len(texts) > 0
            assert all(any(row.endswith(text) for row in rows) for text in texts)
        box = page.value(
            f"(() => {{ const b = document.querySelector('{selector} .tip')"
            ".getBoundingClientRect(); return [b.left, b.right]; })()"
        )
        assert 0 <= box[0] < box[1] <= page.width
    page.hover(".bands .area")
    row, words = page.value(
        "[...document.querySelectorAll('.bands .tip > *')].map(e => e.textContent)"
    )
    assert row.startswith("layer")
    assert words.startswith("step ")


def test_keys_legend_and_slider(browser: Browser, pages: dict[str, Path]) -> None:
    page = browser.page(pages["of several"])
    data: dict[str, Any] = json.loads(page.value("document.getElementById('data').textContent"))
    first = data["charts"][0]
    page.value("document.querySelector('.chart .area').focus()")
    for key, place in (("End", -1), ("ArrowLeft", -2), ("Home", 0), ("ArrowRight", 1)):
        page.key(key)
        said = page.value("document.querySelector('.chart .tip b').textContent")
        assert said == f"step {first['steps'][place]}"
    page.key("Escape")
    assert page.value("document.querySelector('.chart .tip').hidden")
    page.value("document.querySelector('.legend button').click()")
    assert page.value("getComputedStyle(document.querySelector('.line')).display") == "none"
    assert page.value("document.querySelector('.legend button').ariaPressed") == "false"
    page.key("ArrowRight")
    tip = page.value("document.querySelector('.chart .tip').textContent")
    assert first["lines"][0]["label"] + ":" not in tip.replace(first["lines"][1]["label"], "")
    page.value("document.querySelector('.legend button').click()")
    assert page.value("getComputedStyle(document.querySelector('.line')).display") != "none"
    grid = data["ranks"][0]["grid"]
    page.value(
        "(() => { const s = document.querySelector('.ranks input'); s.value = 3; "
        "s.dispatchEvent(new Event('input')); })()"
    )
    shown = page.value(
        "[...document.querySelectorAll('.heat tbody td')].map(e => Number(e.textContent))"
    )
    assert shown == grid["ranks"][3]
    assert page.value("document.querySelector('.ranks output').textContent") == grid["captions"][3]
    assert page.complaints() == []


def test_without_its_script_the_page_is_drawn(browser: Browser, pages: dict[str, Path]) -> None:
    page = browser.page(pages["one"], script=False)
    size = page.call("Page.getLayoutMetrics")["cssContentSize"]
    assert size["height"] > 3000
    shot = page.call("Page.captureScreenshot", format="png")["data"]
    assert len(shot) > 20_000
