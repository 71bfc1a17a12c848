"""The book's own directives: nothing public is left out, tables are read, notebooks are offered."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import pytest
import yaml

import patchsae
from patchbook.chapters.tuning import read_search
from patchbook.pages import add_take_line, format_versions, modules, tidy_docstring, tuning
from patchbook.shipped import shelf
from patchsae.runs.errors import PatchSAEError
from patchsae.runs.stage import project_root

ROOT = project_root()
LIB = Path(patchsae.__file__).parent
ROOMS = [folder.name for folder in sorted(LIB.iterdir()) if (folder / "__init__.py").is_file()]
TOC = [page for page in re.findall(r"file:\s*(\S+)", (ROOT / "_toc.yml").read_text("utf-8"))]


def public(module: str) -> list[ast.AST]:
    """Return functions and classes of a module that do not begin with '_'."""
    path = LIB.parent.joinpath(*module.split(".")).with_suffix(".py")
    kinds = (ast.FunctionDef, ast.ClassDef)
    body = ast.parse(path.read_text("utf-8")).body
    return [node for node in body if isinstance(node, kinds) and not node.name.startswith("_")]


def test_every_page_of_the_guides_and_the_reference_is_in_the_contents():
    there = [p.relative_to(ROOT).with_suffix("").as_posix() for p in (ROOT / "book").rglob("*.md")]
    there += [p.relative_to(ROOT).with_suffix("").as_posix() for p in (ROOT / "book").rglob("*.rst")]
    assert {page for page in there if "/guides/" in page or "/api/" in page} <= set(TOC)


@pytest.mark.parametrize("room", ROOMS)
def test_every_room_has_a_page_of_the_reference(room):
    assert f"book/api/{room}" in TOC
    assert f".. room:: {room}" in (ROOT / "book" / "api" / f"{room}.rst").read_text("utf-8")
    files = {path.stem for path in (LIB / room).glob("*.py") if not path.stem.startswith("_")}
    shown = {name.rpartition(".")[2] for name in modules(room)}
    assert files - shown <= {"cpu_kernels", "gpu_kernels"}


@pytest.mark.parametrize("module", [name for room in ROOMS for name in modules(room)] + ["patchsae.lens"])
def test_every_public_name_says_what_it_is(module):
    assert not [node.name for node in public(module) if not ast.get_docstring(node)]


def test_every_public_name_is_on_a_page_of_the_built_book(html):
    for room in ROOMS:
        page = (html / "book" / "api" / f"{room}.html").read_text("utf-8")
        for module in modules(room):
            for node in public(module):
                assert f'id="{module}.{node.name}"' in page, f"{module}.{node.name}"


def test_a_chapters_notebook_is_beside_its_page_in_the_built_book(html):
    for name in (Path(page).name for page in TOC if "/notebooks/" in page):
        page = html / "book" / "notebooks" / f"{name}.html"
        (link,) = re.findall(rf'href="([^"]*_downloads/[^"]*{name}\.ipynb)"', page.read_text("utf-8"))
        found = json.loads((page.parent / link).read_text("utf-8"))
        assert found == json.loads((ROOT / "notebooks" / f"{name}.ipynb").read_text("utf-8"))
        assert f"jupyter lab notebooks/{name}.ipynb" in re.sub("<[^>]+>", "", page.read_text("utf-8"))


def test_the_line_of_a_chapter_stands_below_its_title_and_nowhere_else():
    cells = [{"cell_type": "code", "source": []}, {"cell_type": "markdown", "source": ["# T\n", "\n", "x"]}]
    source = [json.dumps({"cells": cells})]
    add_take_line(None, "book/intro", source)
    assert json.loads(source[0])["cells"] == cells
    add_take_line(None, "book/notebooks/01_training", source)
    title, _, line, _, _, rest = json.loads(source[0])["cells"][1]["source"].split("\n")
    assert (title, rest) == ("# T", "x") and "/notebooks/01_training.ipynb" in line


def test_a_formula_becomes_literal_and_an_alias_says_nothing():
    lines = ["For x:", "", "    z = |x|", "", "Raises", "------", "Error : never"]
    tidy_docstring(None, "class", "n", None, None, lines)
    assert lines[:5] == ["For x:", "", "::", "", "    z = |x|"] and lines[-1] == "Error : never"
    alias = ["Alias for field number 3"]
    tidy_docstring(None, "attribute", "n", None, None, alias)
    assert alias == []


def test_the_table_of_formats_has_every_version_of_the_code():
    table = "\n".join(format_versions())
    for path in LIB.rglob("*.py"):
        for name, number in re.findall(r"^(VERSION|FORMAT) = (\d+)", path.read_text("utf-8"), re.MULTILINE):
            module = ".".join(("patchsae", *path.relative_to(LIB).with_suffix("").parts))
            assert f"| `{module}` | `{name} = {number}` |" in table


# --- the search of the recipe ---


def test_the_search_chose_what_the_book_ships():
    chosen = read_search().chosen
    shipped = json.loads((shelf() / "main" / "sae.json").read_text("utf-8"))
    assert chosen.passes(shipped["d_in"])
    assert chosen.name.startswith("ReLU") and f"λ {shipped['l1']:.0e}".replace("e-0", "e-") in chosen.name


def test_the_rule_asks_all_four(tmp_path):
    good = read_search().chosen
    assert good.passes(128)
    for worse in ({"l0": 25.7}, {"cosine": 0.51}, {"fvu": good.pca}, {"kept": 0.949}):
        assert not good._replace(**worse).passes(128), worse


def test_the_page_shows_every_candidate_and_the_choice():
    search = read_search()
    table, told = tuning(search)
    assert len(table) == 2 + len(search.candidates) and search.chosen.name in told
    assert all(one.name in row for one, row in zip(search.candidates, table[2:], strict=True))


def test_a_damaged_table_is_named(tmp_path):
    (tmp_path / "main").mkdir()
    (tmp_path / "main" / "sae.json").write_text('{"d_in": 8}')
    for text in ("candidate,L0\nx,1\n", "candidate\n"):
        (tmp_path / "search.csv").write_text(text)
        with pytest.raises(PatchSAEError, match="search.csv' (cannot be read|has no row)"):
            read_search(tmp_path)


def test_the_extension_is_named_by_the_configuration():
    config = yaml.safe_load((ROOT / "_config.yml").read_text("utf-8"))["sphinx"]["config"]
    assert "patchbook.pages" in config["extensions"]
