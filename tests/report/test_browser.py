"""report.html in a headless Chromium: quiet, self-contained, sortable, readable, accessible."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import browser
import pytest
from report_case import full

from qatbench.report.figures import figures
from qatbench.report.html import render
from qatbench.stages.gallery import load

pytestmark = pytest.mark.skipif(bool(browser.missing()), reason=browser.missing() or "a browser")

SMALL, WIDE = (390, 844), (1400, 900)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    case = full()
    shown = load(case, {"scienceqa": "mini", "mmbench": "mini"})
    path = tmp_path_factory.mktemp("report") / "report.html"
    path.write_text(render(case, figures=figures(case), gallery=shown), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with browser.chromium(tmp_path_factory.mktemp("profile")) as driver:
        yield driver


def test_it_asks_nobody_and_complains_of_nothing(chromium: Any, page: Path) -> None:
    chromium.get("about:blank")
    browser.requests(chromium)  # forget those of the browser's own first page
    chromium.get_log("browser")
    browser.show(chromium, page, *WIDE)
    for box in chromium.find_elements("css selector", "details:not([open])"):
        chromium.execute_script("arguments[0].open = true", box)
    asked = {url for url in browser.requests(chromium) if not url.startswith("data:")}
    assert asked == {page.as_uri()}
    assert chromium.execute_script("return performance.getEntriesByType('resource').length") == 0
    assert chromium.get_log("browser") == []


def test_what_it_would_ask_for_is_stopped(chromium: Any, page: Path) -> None:
    """Its policy holds for what might get into it by mistake."""
    browser.show(chromium, page, *WIDE)
    chromium.get_log("browser")
    chromium.execute_script(
        "const image = new Image(); image.src = 'http://127.0.0.1:9/a.png';"
        "document.body.append(image);"
    )
    (entry,) = chromium.get_log("browser")
    assert "Content Security Policy" in entry["message"]


def column(chromium: Any, index: int) -> list[str]:
    """The values that the first table's rows are sorted by."""
    return chromium.execute_script(
        "return [...document.querySelector('#task-1-arms table').tBodies[0].rows]"
        ".map(row => row.cells[arguments[0]].dataset.value ?? '')",
        index,
    )  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", ["accuracy", "cost", "p (Holm)"])
def test_tables_are_sorted_both_ways(chromium: Any, page: Path, name: str) -> None:
    browser.show(chromium, page, *WIDE)
    headings = chromium.find_elements("css selector", "#task-1-arms thead th")
    index = next(k for k, heading in enumerate(headings) if heading.text.startswith(name))
    button = headings[index].find_element("tag name", "button")
    asked = column(chromium, index)
    numbers = sorted(float(value) for value in asked if value)
    unknown = [""] * asked.count("")
    for direction, wanted in (("descending", numbers[::-1]), ("ascending", numbers)):
        button.click()
        got = column(chromium, index)
        assert [float(value) for value in got if value] == wanted
        assert got[len(wanted) :] == unknown  # what is not known stays last
        assert headings[index].get_attribute("aria-sort") == direction
        sorted_by = chromium.find_elements("css selector", "#task-1-arms [aria-sort]")
        assert sorted_by == [headings[index]]
        told = chromium.find_element("id", "sorted").get_attribute("textContent")
        assert told.startswith("Arms on scienceqa: sorted by ")
        assert told.endswith(direction)


def test_names_are_sorted_by_keyboard(chromium: Any, page: Path) -> None:
    browser.show(chromium, page, *WIDE)
    button = chromium.find_element("css selector", "#task-1-arms thead button")
    button.send_keys("\ue007")  # Enter
    names = chromium.execute_script(
        "return [...document.querySelectorAll('#task-1-arms tbody th code')].map(c => c.innerText)"
    )
    assert names == sorted(names)
    assert len(names) == 18


def test_the_gallery_shows_pictures(chromium: Any, page: Path) -> None:
    browser.show(chromium, page, *WIDE)
    widths = chromium.execute_script(
        "const images = [...document.querySelectorAll('.gallery img')];"
        "return Promise.all(images.map(i => i.decode().then(() => i.naturalWidth)))"
    )
    assert len(widths) > 30
    assert min(widths) > 0
    unfolded = chromium.find_elements("css selector", "#task-1-gallery details[open] img")
    assert any(image.is_displayed() and image.size["width"] > 100 for image in unfolded)


@pytest.mark.parametrize("size", [SMALL, WIDE], ids=["390", "1400"])
@pytest.mark.parametrize("unfolded", [False, True], ids=["folded", "unfolded"])
def test_the_page_does_not_scroll_sideways(
    chromium: Any, page: Path, size: tuple[int, int], unfolded: bool
) -> None:
    browser.show(chromium, page, *size)
    if unfolded:
        chromium.execute_script("document.querySelectorAll('details').forEach(d => d.open = true)")
    across, window = chromium.execute_script(
        "return [document.documentElement.scrollWidth, innerWidth]"
    )
    assert window == size[0]
    assert across == window
    outside = chromium.execute_script(
        "return [...document.querySelectorAll('main *')].filter(e => !e.closest('.scroll, .unseen')"
        " && e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML.slice(0, 90))"
    )
    assert outside == []


@pytest.mark.parametrize("size", [SMALL, WIDE], ids=["390", "1400"])
def test_the_verdict_is_on_the_first_screen(
    chromium: Any, page: Path, size: tuple[int, int]
) -> None:
    browser.show(chromium, page, *size)
    for words in (".headline", ".card .ship", ".card .why", ".card .numbers", ".card .price"):
        box = chromium.find_element("css selector", words).rect
        assert box["y"] + box["height"] <= size[1], words


@pytest.mark.parametrize(("scheme", "size"), [("light", SMALL), ("dark", WIDE)])  # 10 s each
def test_axe_finds_nothing_serious(
    chromium: Any, page: Path, scheme: str, size: tuple[int, int]
) -> None:
    from axe_core_python.selenium import Axe

    browser.show(chromium, page, *size, scheme)
    chromium.execute_script("document.querySelectorAll('details').forEach(d => d.open = true)")
    found = Axe().run(chromium)
    serious = [
        (rule["id"], node["html"][:120], node.get("failureSummary", "")[:200])
        for rule in found["violations"]
        if rule["impact"] in ("serious", "critical")
        for node in rule["nodes"][:3]
    ]
    assert serious == []
    assert "color-contrast" in {rule["id"] for rule in found["passes"]}  # it did look


def test_the_schemes_differ(chromium: Any, page: Path) -> None:
    colours = []
    for scheme in ("light", "dark"):
        browser.show(chromium, page, *WIDE, scheme)
        colours.append(
            chromium.execute_script("return getComputedStyle(document.body).backgroundColor")
        )
    assert colours == ["rgb(247, 247, 245)", "rgb(18, 21, 26)"]


def test_parts_unfold_by_keyboard_and_by_links(chromium: Any, page: Path) -> None:
    browser.show(chromium, page, *WIDE)
    part = chromium.find_element("id", "task-1-pairs")
    assert part.get_attribute("open") is None
    for expected in ("true", None):
        part.find_element("css selector", "summary").send_keys("\ue007")
        assert part.get_attribute("open") == expected
    chromium.execute_script("location.hash = 'task-1-pairs'")
    chromium.execute_async_script("requestAnimationFrame(arguments[0])")
    assert part.get_attribute("open") == "true"


@pytest.fixture
def paper(chromium: Any, page: Path) -> Iterator[Any]:
    """The page as it is laid out on A4 (186 mm between the margins), on a dark screen."""
    browser.show(chromium, page, 703, 1000, "dark")
    chromium.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print", "features": [
        {"name": "prefers-color-scheme", "value": "dark"}]})  # fmt: skip
    chromium.execute_script("dispatchEvent(new Event('beforeprint'))")
    yield chromium
    chromium.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})


def test_paper_is_light_and_nothing_sticks_or_is_cut(paper: Any) -> None:
    look = "getComputedStyle(document.querySelector('%s')).%s"
    assert paper.execute_script(f"return {look % ('body', 'backgroundColor')}") == (
        "rgb(255, 255, 255)"
    )
    assert paper.execute_script(f"return {look % ('body', 'color')}") == "rgb(28, 33, 40)"
    stuck = paper.execute_script(
        "return [...document.querySelectorAll('main *')]"
        ".filter(e => getComputedStyle(e).position === 'sticky').length"
    )
    assert stuck == 0
    assert paper.execute_script(f"return {look % ('nav.contents', 'display')}") == "none"
    cut = paper.execute_script(
        "return [...document.querySelectorAll('main table, main figure, main .flip, .card *')]"
        ".filter(e => e.getBoundingClientRect().right > document.querySelector('main')"
        ".getBoundingClientRect().right + 1 && !e.closest('.unseen'))"
        ".map(e => e.outerHTML.slice(0, 80))"
    )
    assert cut == []
    scrolls = paper.execute_script(
        "return [...document.querySelectorAll('.scroll')]"
        ".filter(e => getComputedStyle(e).overflowX !== 'visible').length"
    )
    assert scrolls == 0


def test_a_tables_head_is_printed_again_on_each_page(paper: Any) -> None:
    """A button in it would be left blank there."""
    shown = paper.execute_script(
        "return [...new Set([...document.querySelectorAll('thead button')]"
        ".map(e => getComputedStyle(e).display))]"
    )
    assert shown == ["contents"]
    pdf = paper.execute_cdp_cmd("Page.printToPDF", {"preferCSSPageSize": True})
    assert base64.b64decode(pdf["data"]).startswith(b"%PDF")


def test_what_takes_pages_is_printed_as_the_reader_left_it(paper: Any) -> None:
    def folded() -> list[str]:
        classes: list[str] = paper.execute_script(
            "return [...document.querySelectorAll('details:not([open])')].map(e => e.className)"
        )
        return classes

    assert {kind for names in folded() for kind in names.split()} <= {
        "part", "wall", "lengthy", "more", "full", "hint",
    }  # fmt: skip
    assert not [names for names in folded() if names == "part"]
    walls = paper.execute_script("return [...document.querySelectorAll('.wall')].map(e => e.open)")
    assert 0 < sum(walls) < len(walls)
    paper.execute_script("dispatchEvent(new Event('afterprint'))")
    assert "part" in folded()  # folded again
