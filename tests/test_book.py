"""The rendered book in a browser without a network, as a reader opens it from disk.

Where the book is not built yet (a clean clone, CI) the session builds a small one first.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path
from urllib.parse import unquote, urlparse

import pytest
import yaml
from bs4 import BeautifulSoup

from patchsae.runs.stage import project_root

ROOT = project_root()
PAGES = re.findall(r"(?:root|file):\s*(\S+)", (ROOT / "_toc.yml").read_text())
# of the reference one page: Sphinx makes all of them alike
PAGES = [page for page in PAGES if not page.startswith("book/api/") or page.endswith("/sae")]
MEDIA = """() => [...document.images]
  .filter(i => !i.complete || i.naturalWidth === 0).map(i => i.src)"""
# MathJax replaces the TeX by svg; what it could not read it marks as merror.
MATH = """() => ({
  left: [...document.querySelectorAll('.math')].filter(m => !m.querySelector('mjx-container svg'))
        .map(m => m.textContent),
  broken: [...document.querySelectorAll('[data-mml-node="merror"]')].map(m => m.textContent),
})"""


# Of each figure: points of its smallest text, its inches, and the pixels it is shown at.
FIGURES = """() => [...document.querySelectorAll('main figure.drawn')].filter(f => f.dataset.smallest)
  .map(f => ({points: +f.dataset.smallest, inches: +getComputedStyle(f).getPropertyValue('--inches'),
              width: f.querySelector('img').getBoundingClientRect().width,
              alt: f.querySelector('img').alt, room: f.clientWidth}))"""


def settle_math(page) -> None:
    """Wait until MathJax has typeset what the page held."""
    if page.evaluate("() => document.querySelectorAll('.math').length"):
        page.wait_for_function("() => window.MathJax?.startup?.promise")
        page.evaluate("() => MathJax.startup.promise")


def test_the_table_of_contents_is_read_whole():
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text())
    assert toc["root"] in PAGES
    assert len(PAGES) == str(toc).count("'file'") + 1 - str(toc).count("'book/api/") + 1


def test_the_first_page_leads_to_the_introduction(visit, html):
    page, wrong = visit(html / "index.html")
    page.wait_for_url((html / f"{PAGES[0]}.html").as_uri())
    assert wrong == []


@pytest.mark.parametrize("name", PAGES)
def test_a_page_opens_from_disk_without_network_and_without_errors(visit, html, name):
    page, wrong = visit(html / f"{name}.html")
    settle_math(page)
    # Pictures below the fold are loaded lazily.
    page.evaluate("() => { for (const i of document.images) i.loading = 'eager'; }")
    page.wait_for_timeout(300)
    assert page.evaluate(MEDIA) == []
    assert page.evaluate(MATH) == {"left": [], "broken": []}
    assert page.locator("h1").count() >= 1
    assert wrong == []


@functools.cache
def markup(path: Path) -> BeautifulSoup:
    """Read a page as it lies on the disk, which takes a hundredth of opening it."""
    return BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser")


@pytest.mark.parametrize("name", PAGES)
def test_no_control_of_a_page_needs_a_network_or_a_kernel(html, name):
    for dead in (".btn-launch-buttons, .dropdown-launch-buttons", ".btn-source-buttons", ".thebe"):
        assert not markup(html / f"{name}.html").select(dead)


def test_every_page_carries_the_attribution(html):
    for name in PAGES:
        footer = [one.get_text() for one in markup(html / f"{name}.html").select("footer")]
        assert any("OpenMoji" in text and "CC BY-SA 4.0" in text for text in footer), name
        assert any("Twemoji" in text and "CC BY 4.0" in text for text in footer), name


def test_every_local_link_leads_to_a_page(html):
    for name in PAGES:
        here = html / f"{name}.html"
        links = [urlparse(link["href"]) for link in markup(here).select("a[href]")]
        local = [unquote(link.path) for link in links if not link.scheme and not link.netloc]
        assert len(local) > 10
        for path in local:
            assert (here.parent / path).exists(), f"{name} links to {path}"


def test_the_search_of_the_book_finds_a_word_offline(visit, html):
    page, wrong = visit(html / "search.html")
    page.goto(f"{(html / 'search.html').as_uri()}?q=pictogram")
    page.wait_for_selector("#search-results li a")
    assert wrong == []


# Of each element: its text's colour against the first background below it that is not transparent.
CONTRAST = """chosen => [...document.querySelectorAll(chosen)].map(one => {
  const parts = colour => colour.match(/[\\d.]+/g).map(Number);
  let below = one, ground = [0, 0, 0, 0];
  while (below && ground[3] === 0) {
    const [r, g, b, alpha = 1] = parts(getComputedStyle(below).backgroundColor);
    [ground, below] = [[r, g, b, alpha], below.parentElement];
  }
  const light = colour => colour.slice(0, 3).map(v => v / 255)
    .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const [a, b] = [light(parts(getComputedStyle(one).color)), light(ground)];
  return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05); })"""


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_a_finding_can_be_read_and_has_no_frame_of_another_colour(visit, html, theme):
    page, _ = visit(html / "book" / "notebooks" / "01_training.html")
    page.evaluate("theme => { document.documentElement.dataset.theme = theme; }", theme)
    page.wait_for_timeout(400)  # colours fade in
    seen = page.evaluate(CONTRAST, ".finding p, .finding strong")
    assert len(seen) > 2 and min(seen) >= 4.5
    frame = """() => getComputedStyle(document.querySelector('.text_html:has(.finding)')).backgroundColor"""
    assert page.evaluate(frame) == "rgba(0, 0, 0, 0)"


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_every_verdict_of_the_report_can_be_read(visit, html, theme):
    page, _ = visit(html / "book" / "report.html")
    page.evaluate("theme => { document.documentElement.dataset.theme = theme; }", theme)
    page.wait_for_timeout(400)
    seen = page.evaluate(CONTRAST, "table.rows .verdict")
    assert len(seen) > 20 and min(seen) >= 4.5


def test_the_verdicts_are_seen_on_a_narrow_screen_without_scrolling_sideways(visit, html):
    page, _ = visit(html / "book" / "report.html", width=400)
    for badge in (page.locator("table.rows .verdict").nth(at) for at in (0, 2, 12)):
        badge.scroll_into_view_if_needed()
        box = badge.bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= 400
    assert page.evaluate("() => document.documentElement.scrollWidth") <= 400


@pytest.mark.parametrize("page", ["facts", "data_card", "glossary", "intro"])
def test_prose_needs_no_scrolling_sideways_on_a_narrow_screen(visit, html, page):
    shown, _ = visit(html / "book" / f"{page}.html", width=400)
    assert shown.evaluate("() => document.documentElement.scrollWidth") <= 400


@pytest.mark.parametrize("name", PAGES)
def test_the_text_of_every_figure_is_8_pixels_high_and_has_words_and_files(visit, html, name):
    whole = name.startswith("book/notebooks/0") and not name.endswith("07_explorer")
    if not whole and not markup(html / f"{name}.html").select("figure.drawn"):
        return
    page, _ = visit(html / f"{name}.html", width=1280)
    for width in (1280, 400):
        page.set_viewport_size({"width": width, "height": 900})
        seen = page.evaluate(FIGURES)
        assert seen or not whole
        for one in seen:
            assert one["points"] * one["width"] / one["inches"] / 72 >= 8, one
            assert len(one["alt"]) > 20 and one["width"] <= max(one["room"], 7 * 77)


def test_a_figure_leads_to_its_code(visit, html):
    page, _ = visit(html / "book" / "notebooks" / "01_training.html")
    figure = page.locator("figure.drawn").first
    figure.locator("a.to-code").click()
    assert page.locator(".cell:has(figure.drawn)").first.locator("details[open]").count() == 1


def test_the_introduction_says_what_this_run_found(visit, html):
    page, _ = visit(html / "book" / "intro.html")
    assert page.locator(".found table.claims tbody tr").count() == 3
    assert page.locator(".found .verdict").count() >= 3 and page.locator(".found img").count() == 1
    shown = page.locator("main").inner_text()
    assert "figures and tables of the paper that a run can refute" in shown
    assert "Adaptation gains more on pairs" in shown


def test_what_a_page_lacks_is_seen(visit, tmp_path):
    path = tmp_path / "page.html"
    path.write_text("<title>a</title><img src='gone.png'><script src='gone.js'></script>")
    _, wrong = visit(path)
    assert sum("gone.png net::ERR_FILE_NOT_FOUND" in line for line in wrong) == 1
    assert any("gone.js net::ERR_FILE_NOT_FOUND" in line for line in wrong)
