"""A notebook's figures as files of a book, and the HTML that names them."""

import base64
import re

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from patchbook.collecting import FIGURE, collect_lessons
from patchbook.publishing import publish

SAID = {"name": "overview", "items": ["Fig. 1"], "caption": "A < B.", "alt": 'It says "a".',
        "inches": [5.0, 2.5], "smallest": 8.0}  # fmt: skip


def figure_output():
    data = {"image/png": base64.b64encode(b"png").decode(), "text/csv": "x,y\n1,2\n", "text/plain": "f"}
    data["application/pdf"] = base64.b64encode(b"pdf").decode()
    return new_output("display_data", data, metadata={FIGURE: dict(SAID)})


@pytest.fixture
def notebook(tmp_path):
    """Write a notebook of two figures below one target; return it, its source and a book's folder."""
    cells = [
        new_markdown_cell("# One\n\n(fig-1)=\n## First"),
        new_code_cell("draw()", outputs=[figure_output(), figure_output()]),
        new_code_cell("print(1)", outputs=[new_output("stream", text="1")]),
    ]
    path = tmp_path / "run" / "01_one.ipynb"
    path.parent.mkdir()
    nbformat.write(new_notebook(cells=cells), path)
    source = tmp_path / "01_one.ipynb"
    source.write_text("{}")
    return path, source, tmp_path / "book"


def test_figures_become_files_and_html(notebook):
    path, source, book = notebook
    drawn = publish(nbformat.read(path, 4), source, book)
    folder = book / "_static" / "figures" / "01_one"
    names = [f"{name}.{ending}" for name in ("fig-1", "fig-1-2") for ending in ("csv", "pdf", "png")]
    assert sorted(file.name for file in folder.iterdir()) == sorted(names)
    assert (folder / "fig-1.csv").read_text() == "x,y\n1,2\n" and (
        folder / "fig-1.png"
    ).read_bytes() == b"png"
    assert [one["png"] for one in drawn] == [
        f"_static/figures/01_one/{n}.png" for n in ("fig-1", "fig-1-2")
    ]
    shown = nbformat.read(book / "notebooks" / "01_one.ipynb", 4)
    first, second = (output["data"] for output in shown.cells[1].outputs)
    assert set(first) == {"text/html"} and "A &lt; B." in first["text/html"]
    assert 'alt="It says &quot;a&quot;."' in first["text/html"] and "paper's Fig. 1" in first["text/html"]
    assert "fig-1-2.png" in second["text/html"]
    page = book / "book" / "notebooks"  # where it lies below the pages' _static
    for address in re.findall(r'(?:href|src)="([^"#]+)"', first["text/html"]):
        assert (page / address).resolve().is_file(), address
    assert shown.cells[2].outputs[0].text == "1"


def test_publishing_again_writes_nothing_and_removes_what_is_gone(notebook):
    path, source, book = notebook
    publish(nbformat.read(path, 4), source, book)
    files = [file for file in book.rglob("*") if file.is_file()]
    before = {file: file.stat().st_mtime_ns for file in files}
    (book / "_static" / "figures" / "01_one" / "old.png").write_bytes(b"")
    publish(nbformat.read(path, 4), source, book)
    assert {file: file.stat().st_mtime_ns for file in book.rglob("*") if file.is_file()} == before


def test_a_cell_may_say_what_its_figure_shows(notebook):
    path, source, book = notebook
    executed = nbformat.read(path, 4)
    executed.cells[1].metadata["mystnb"] = {"figure": {"caption": "Own."}, "image": {"alt": "Own words."}}
    nbformat.write(executed, path)
    publish(nbformat.read(path, 4), source, book)
    cell = nbformat.read(book / "notebooks" / "01_one.ipynb", 4).cells[1]
    assert (
        "Own." in cell.outputs[0].data["text/html"]
        and 'alt="Own words."' in cell.outputs[0].data["text/html"]
    )
    assert cell.metadata["mystnb"] == {}


def test_the_main_result_of_a_chapter_is_its_first_lesson(tmp_path):
    said = [{"text": text, "label": label, "rank": rank} for text, label, rank in
            (("Second.", "b", 2), ("First.", "a", 1))]  # fmt: skip
    outputs = [new_output("display_data", {}, metadata={"patchsae-lesson": one}) for one in said]
    nbformat.write(new_notebook(cells=[new_code_cell("x", outputs=outputs)]), tmp_path / "01_one.ipynb")
    nbformat.write(new_notebook(cells=[new_code_cell("x")]), tmp_path / "02_two.ipynb")
    paths = sorted(tmp_path.glob("*.ipynb"))
    assert collect_lessons(paths) == [{"text": "First.", "cell": "01_one.ipynb#a"}]


@pytest.mark.parametrize(
    ("heading", "kept"),
    [
        ("(fig-1)=\n## First", ["Fig. 1"]),
        ("(fig-10)=\n(fig-1b)=\n## Both", ["Fig. 1", "Fig. 10"]),
        ("(truth)=\n## Beyond the paper", []),
    ],
)
def test_a_figure_stands_for_the_items_of_its_section_alone(notebook, heading, kept):
    path, source, book = notebook
    executed = nbformat.read(path, 4)
    executed.cells[0].source = heading
    for output in executed.cells[1].outputs:
        output.metadata[FIGURE]["items"] = ["Fig. 1", "Fig. 10"]
    drawn = publish(executed, source, book)
    assert [one["items"] for one in drawn] == [kept, kept]
    html = nbformat.read(book / "notebooks" / "01_one.ipynb", 4).cells[1].outputs[0].data["text/html"]
    assert (f"After the paper's {', '.join(kept)}." in html) is bool(kept)
