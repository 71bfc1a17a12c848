"""The rendered book in a browser without a network, as a reader opens it from disk.

Where the book is not built yet (a clean clone, CI) the session builds it first.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote, urlparse

import pytest
import yaml
from playwright.sync_api import sync_playwright

from patchsae.stage import project_root

ROOT = project_root()
HTML = ROOT / "_build" / "html"
CHROMIUM = Path("/usr/bin/chromium")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--no-first-run",
    "--disable-component-update",
    "--disable-sync",
]
PAGES = re.findall(r"(?:root|file):\s*(\S+)", (ROOT / "_toc.yml").read_text())
MEDIA = """() => [...document.images]
  .filter(i => !i.complete || i.naturalWidth === 0).map(i => i.src)"""
# MathJax replaces the TeX by svg; what it could not read it marks as merror.
MATH = """() => ({
  left: [...document.querySelectorAll('.math')].filter(m => !m.querySelector('mjx-container svg'))
        .map(m => m.textContent),
  broken: [...document.querySelectorAll('[data-mml-node="merror"]')].map(m => m.textContent),
})"""


@pytest.fixture(scope="session")
def html() -> Path:
    """Build the book unless it is there."""
    if not (HTML / "index.html").is_file():
        command = [sys.executable, "book/build.py"]
        built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if built.returncode:
            pytest.fail(built.stdout + built.stderr, pytrace=False)
        assert built.stdout.splitlines()[-1] == f"open {(HTML / 'index.html').as_uri()}"
    return HTML


@pytest.fixture(scope="session")
def browser():
    """Start Debian's Chromium; without it the tests are skipped, but never in CI."""
    if not CHROMIUM.exists():
        message = f"{CHROMIUM} is missing: apt-get install chromium to test the book in a browser"
        if os.environ.get("CI") == "true":
            pytest.fail(message)
        pytest.skip(message)
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=str(CHROMIUM), args=FLAGS)
        yield started
        started.close()


@pytest.fixture
def visit(browser, html):
    """Return a function that opens a page in a fresh context and tells what went wrong there."""
    contexts = []

    def open_page(path: Path):
        context = browser.new_context(viewport={"width": 1400, "height": 900})
        contexts.append(context)
        page = context.new_page()
        wrong: list[str] = []

        def gate(route):
            if urlparse(route.request.url).scheme in ("file", "data", "blob"):
                route.continue_()
            else:
                wrong.append(f"asked the network: {route.request.url}")
                route.abort()

        context.route("**/*", gate)
        context.on("requestfailed", lambda r: wrong.append(f"failed: {r.url} {r.failure}"))
        page.on("console", lambda m: wrong.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda e: wrong.append(f"page error: {e}"))
        page.goto(path.as_uri(), wait_until="load")
        return page, wrong

    yield open_page
    for context in contexts:
        context.close()


def settle_math(page) -> None:
    """Wait until MathJax has typeset what the page held."""
    if page.evaluate("() => document.querySelectorAll('.math').length"):
        page.wait_for_function("() => window.MathJax?.startup?.promise")
        page.evaluate("() => MathJax.startup.promise")


def test_the_table_of_contents_is_read_whole():
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text())
    assert toc["root"] in PAGES
    assert len(PAGES) == str(toc).count("'file'") + 1


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


@pytest.mark.parametrize("name", PAGES)
def test_no_control_of_a_page_needs_a_network_or_a_kernel(visit, html, name):
    page, _ = visit(html / f"{name}.html")
    for dead in (".btn-launch-buttons, .dropdown-launch-buttons", ".btn-source-buttons", ".thebe"):
        assert page.locator(dead).count() == 0


def test_every_page_carries_the_attribution(visit, html):
    for name in PAGES:
        page, _ = visit(html / f"{name}.html")
        footer = page.locator("footer").all_inner_texts()
        assert any("OpenMoji" in text and "CC BY-SA 4.0" in text for text in footer), name
        assert any("Twemoji" in text and "CC BY 4.0" in text for text in footer), name


def test_every_local_link_leads_to_a_page(visit, html):
    for name in PAGES:
        page, _ = visit(html / f"{name}.html")
        for link in page.evaluate("() => [...document.links].map(a => a.href)"):
            if link.startswith("file:"):
                assert Path(unquote(urlparse(link).path)).exists(), f"{name} links to {link}"


def test_the_search_of_the_book_finds_a_word_offline(visit, html):
    page, wrong = visit(html / "search.html")
    page.goto(f"{(html / 'search.html').as_uri()}?q=pictogram")
    page.wait_for_selector("#search-results li a")
    assert wrong == []
