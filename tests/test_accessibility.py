"""No page has what axe calls a barrier: light on a wide screen, dark on a narrow one."""

import re

import pytest
from axe_playwright_python.sync_playwright import Axe

from patchsae.runs.stage import project_root

PAGES = re.findall(r"(?:root|file):\s*(\S+)", (project_root() / "_toc.yml").read_text())
# of the reference one page: Sphinx makes all of them alike
PAGES = [page for page in PAGES if not page.startswith("book/api/") or page.endswith("/sae")]


def barriers(page, theme: str) -> list[str]:
    """Return what axe finds on a page, a line for each rule with the first place."""
    page.emulate_media(reduced_motion="reduce")
    for name in ("mode", "theme"):
        page.evaluate(
            "([name, theme]) => { document.documentElement.dataset[name] = theme; }", [name, theme]
        )
    page.wait_for_timeout(500)  # colours fade in
    found = Axe().run(page).response["violations"]
    if "/api/" in page.url:  # how Sphinx writes a function's fields
        found = [rule for rule in found if rule["id"] != "definition-list"]
    return [f"{rule['id']} × {len(rule['nodes'])}: {rule['nodes'][0]['html'][:200]}" for rule in found]


@pytest.mark.parametrize("name", [*PAGES, "search", "genindex"])
def test_axe_finds_nothing(visit, html, name):
    wide, narrow = ("light", 1280), ("dark", 400)
    # text alone is laid out alike on all pages: one way each, in turn
    turn = [(wide,), (narrow,)][len(name) % 2] if "/guides/" in name else (wide, narrow)
    page, _ = visit(html / f"{name}.html", width=turn[0][1])
    for theme, width in turn:
        page.set_viewport_size({"width": width, "height": 900})
        assert barriers(page, theme) == []


def test_axe_finds_a_picture_without_words(visit, tmp_path):
    path = tmp_path / "page.html"
    path.write_text(
        "<html lang=en><title>a</title><main><h1>a</h1><img src='data:image/gif;base64,R0lGODlh'>"
    )
    page, _ = visit(path)
    assert [line.split(" ×")[0] for line in barriers(page, "light")] == ["image-alt"]
