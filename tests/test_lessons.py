"""What a chapter has learned is said where it is found, and again where the chapter opens."""

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from patchbook.lessons import KEY, TITLE, Lesson, lesson, lessons_of, put_first, read_lessons
from patchbook.report import Verdict, finding
from patchbook.run import run_notebook


def shown(one):
    data, metadata = one._repr_mimebundle_()
    return new_output("display_data", data=data, metadata=metadata)


def notebook(*lessons):
    cells = [new_markdown_cell("# Title"), new_markdown_cell("(fig-2)=\n## Section")]
    cells += [new_code_cell("1", outputs=[shown(one)]) for one in lessons]
    return new_notebook(cells=cells)


def test_lessons_stand_below_the_title_the_main_one_first():
    book = notebook(Lesson("Second.", "fig-2", 2), Lesson("First.", "fig-2", 1))
    put_first(book)
    assert [one.text for one in read_lessons(book)] == ["First.", "Second."]
    opening = book.cells[1].source.splitlines()
    assert book.cells[0].source == "# Title" and opening[0] == TITLE
    assert opening[2] == "1. First. {ref}`Shown here <fig-2>`."
    assert opening[3].startswith("2. Second.")
    nbformat.validate(book)


def test_a_notebook_without_lessons_stays_as_it_is():
    book = notebook()
    put_first(book)
    assert len(book.cells) == 2


@pytest.mark.parametrize(
    ("verdict", "text"),
    [
        (Verdict.REPRODUCED, "Yes, 3 [1, 5] points."),
        (Verdict.DIFFERS, "No."),
        (Verdict.OPEN, "Unclear."),
        (Verdict.PAPER_SCALE, "Unclear."),
    ],
)
def test_a_lesson_follows_the_verdict(verdict, text):
    found = finding(
        "Fig. 2", claim="c", quantity="q", ours=(3.0, 1.0, 5.0), unit="points", rule="r", verdict=verdict,
        why="w", reason="at chance", effect=1.0, effect_name="e",
    )  # fmt: skip
    said = lesson(found, 1, holds="Yes, {}.", fails="No.", open_="Unclear.")
    assert said.text.replace(".00", "") == text and said.label == "fig-2"


def test_the_runner_opens_a_notebook_with_what_it_learned(tmp_path):
    source = new_notebook(
        cells=[
            new_markdown_cell("# Title"),
            new_code_cell("seed: int = 0", metadata={"tags": ["parameters"]}),
            new_code_cell("from patchbook.lessons import Lesson\nLesson(f'Seed {seed}.', 'fig-2')"),
        ]
    )
    nbformat.write(source, tmp_path / "in.ipynb")
    run_notebook(tmp_path / "in.ipynb", tmp_path / "out.ipynb", {"seed": 3})
    executed = nbformat.read(tmp_path / "out.ipynb", 4)
    assert executed.cells[1].source.startswith(TITLE) and "Seed 3." in executed.cells[1].source
    assert lessons_of(tmp_path / "out.ipynb") == [Lesson("Seed 3.", "fig-2", 1)]
    assert executed.cells[-1].outputs[0].metadata[KEY]["text"] == "Seed 3."
