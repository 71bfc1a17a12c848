"""book/build.py on a tiny book: what is executed again, and what a failed build leaves."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from patchbook.executing import execute, outdated
from patchbook.run import NotebookFailed
from patchsae.runs.stage import project_root

ROOT = project_root()
TOC = """format: jb-book
root: book/intro
chapters:
  - file: book/notebooks/01_first
  - file: book/notebooks/02_second
"""


SECOND = """import sys
from pathlib import Path
sys.path.insert(0, "lib")
import part
print(part.A, Path("artefacts/thing/card.json").read_text())"""


def write_notebook(folder: Path, name: str, code: str) -> None:
    """Write a notebook that executes `code`."""
    cells = [
        new_markdown_cell(f"# {name}\n\n$x^2$"),
        new_code_cell("n = 1", metadata={"tags": ["parameters"]}),
        new_code_cell(code),
    ]
    # Ids are random otherwise, and the same notebook written twice would count as changed.
    for number, cell in enumerate(cells):
        cell["id"] = f"cell-{number}"
    metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(new_notebook(cells=cells, metadata=metadata), folder / f"{name}.ipynb")


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """Build a tiny book with the real configuration, once."""
    root = tmp_path_factory.mktemp("book")
    for name in ("pyproject.toml", "_config.yml"):
        shutil.copy(ROOT / name, root / name)
    (root / "_toc.yml").write_text(TOC)
    (root / "notebooks").mkdir()
    (root / "lib").mkdir()
    (root / "lib" / "part.py").write_text('"""A part."""\n\nA = 1\n')
    (root / "lib" / "other.py").write_text("B = 1\n")
    (root / "artefacts" / "thing").mkdir(parents=True)
    (root / "artefacts" / "thing" / "card.json").write_text("{}")
    shutil.copytree(
        ROOT / "book" / "_static",
        root / "book" / "_static",
        ignore=shutil.ignore_patterns("vendor"),
    )
    (root / "book" / "intro.md").write_text("# Intro\n\nSee [first](notebooks/01_first.ipynb).\n")
    write_notebook(root / "notebooks", "01_first", "print(n)")
    write_notebook(root / "notebooks", "02_second", SECOND)
    ran = build(root)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return root


@pytest.fixture
def book(built, tmp_path) -> Path:
    """Give each test a copy of the built book."""
    return Path(shutil.copytree(built, tmp_path / "book"))


def build(root: Path, *options: str) -> subprocess.CompletedProcess:
    """Run the real build script in a folder."""
    command = [sys.executable, str(ROOT / "book" / "build.py"), *options]
    return subprocess.run(command, cwd=root, capture_output=True, text=True)


def executed(ran: subprocess.CompletedProcess) -> list[str]:
    """Name the notebooks that a build executed."""
    return named(ran.stdout)


def named(told: str) -> list[str]:
    """Name the notebooks that are said to run."""
    return [line.split(":")[0] for line in told.splitlines() if line.endswith("running …")]


def executes(root: Path, capsys) -> list[str]:
    """Bring the notebooks up to date as the build does, without rendering; name what was executed."""
    execute(root, root / "_build", ["01_first", "02_second"], {}, shipped=False)
    return named(capsys.readouterr().out)


def test_the_build_ends_with_the_page_to_open(book):
    again = build(book)
    assert again.stdout.splitlines()[-1] == f"open {(book / '_build/html/index.html').as_uri()}"
    for page in ("index", "book/intro", "book/notebooks/01_first", "book/notebooks/02_second"):
        assert (book / "_build" / "html" / f"{page}.html").is_file()


def test_a_second_build_does_nothing(book):
    again = build(book)
    assert again.returncode == 0, again.stderr
    assert executed(again) == [] and "pages: unchanged" in again.stdout


def test_a_check_says_what_would_be_made_anew_and_makes_nothing(book):
    fresh = build(book, "--check")
    assert (fresh.returncode, fresh.stdout) == (0, "everything is up to date\n")
    (book / "book" / "intro.md").write_text("# Intro\n\nOtherwise.\n")
    stale = build(book, "--check")
    assert (stale.returncode, stale.stdout) == (1, "to be made anew: pages\n")
    args = book, book / "_build", ["01_first", "02_second"], {}
    assert outdated(*args) == []
    (book / "lib" / "part.py").write_text("A = 2\n")
    assert outdated(*args) == ["02_second"]
    write_notebook(book / "notebooks", "01_first", "print('changed')")
    assert outdated(*args) == ["01_first", "02_second"]


@pytest.mark.parametrize(
    ("changed", "text", "runs"),
    [
        ("lib/part.py", "A = 2\n", ["02_second"]),
        ("lib/part.py", '"""Said otherwise."""\n\nA = 1  # so\n', []),
        ("lib/other.py", "B = 2\n", []),
        ("artefacts/thing/card.json", '{"a": 1}', ["02_second"]),
        ("artefacts/thing/weights", "more", ["02_second"]),
        ("book/intro.md", "# Intro\n\nOtherwise.\n", []),
    ],
)
def test_a_change_executes_what_used_it(book, capsys, changed, text, runs):
    (book / changed).write_text(text)
    assert executes(book, capsys) == runs
    assert executes(book, capsys) == []


def test_a_change_of_code_executes_it_and_what_reads_it(book, capsys):
    # no order is known of these two, so that the second depends on the first
    write_notebook(book / "notebooks", "01_first", "print('changed')")
    assert executes(book, capsys) == ["01_first", "02_second"]
    write_notebook(book / "notebooks", "02_second", "print('changed')")
    assert executes(book, capsys) == ["02_second"]


def test_a_change_of_text_is_on_the_page_and_executes_nothing(book):
    path = book / "notebooks" / "01_first.ipynb"
    notebook = nbformat.read(path, as_version=4)
    notebook.cells[0].source = "# Another title"
    notebook.cells.append(new_markdown_cell("(end)=\n## The end"))
    nbformat.write(notebook, path)
    intro = book / "book" / "intro.md"
    intro.write_text(f"{intro.read_text()}\n\nSee {{ref}}`end`.\n")
    again = build(book)
    assert again.returncode == 0 and executed(again) == []
    assert "rendered again, as book/_static/notebooks/01_first.ipynb" in again.stdout
    html = book / "_build" / "html" / "book"
    page = (html / "notebooks" / "01_first.html").read_text()
    assert "Another title" in page and "The end" in page and "The end" in (html / "intro.html").read_text()
    # the page with the link is the same, and still does not stay as it was
    notebook.cells.pop()
    nbformat.write(notebook, path)
    broken = build(book)
    assert broken.returncode == 1 and "intro.md" in broken.stderr and "end" in broken.stderr


def test_a_failing_notebook_stops_the_build_and_loses_nothing(book, capsys):
    write_notebook(book / "notebooks", "02_second", "1 / 0")
    failed = build(book)
    assert failed.returncode == 1
    assert "ZeroDivisionError" in failed.stderr and "failed.ipynb" in failed.stderr
    # It is not trusted by the next build either, and what was executed before stays.
    with pytest.raises(NotebookFailed):
        executes(book, capsys)
    assert named(capsys.readouterr().out) == ["02_second"]
    write_notebook(book / "notebooks", "02_second", SECOND)
    assert executes(book, capsys) == []


def test_an_unfinished_stage_is_not_trusted(book, capsys):
    (stage,) = (book / "_build" / "notebooks").glob("02_second-*")
    (stage / "manifest.json").unlink()
    assert executes(book, capsys) == ["02_second"]


def test_a_lost_page_is_rendered_again(book):
    page = book / "_build" / "html" / "book" / "notebooks" / "01_first.html"
    page.unlink()
    again = build(book)
    assert again.returncode == 0 and executed(again) == [] and page.is_file()
    assert "pages: rendered again, as a page is missing" in again.stdout


def test_a_warning_fails_the_build_every_time(book):
    (book / "book" / "intro.md").write_text("# Intro\n\n[nowhere](nowhere.md)\n")
    for _ in range(2):
        warned = build(book)
        assert warned.returncode == 1
        assert "nowhere" in warned.stderr and "mend the warnings" in warned.stderr
    assert not (book / "_build" / "html" / "inputs.json").exists()


def test_a_page_without_a_notebook_is_one_sentence(book):
    (book / "notebooks" / "02_second.ipynb").unlink()
    refused = build(book)
    assert refused.returncode == 1 and "02_second.ipynb: add it" in refused.stderr
