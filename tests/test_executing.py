"""How chapters are brought up to date: what an execution used, who waits for whom, whose text is shown."""

from __future__ import annotations

import os
from types import SimpleNamespace

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from patchbook import executing
from patchbook.executing import share, with_text_of
from patchbook.order import READS, TRAINS, readings
from patchbook.run import USED, run_notebook
from patchbook.used import code_digest, read_used, used_digest
from patchsae.runs.errors import PatchSAEError
from patchsae.runs.stage import project_root

CODE = '''
def f(x):
    """Say something."""
    return x + 1
'''


@pytest.mark.parametrize(
    ("other", "same"),
    [
        (CODE.replace("Say something.", "Say more."), True),
        (CODE.replace("return", "# a comment\n    return"), True),
        (CODE.replace("x + 1", "x + 2"), False),
        (CODE.replace("(x)", "(x=0)"), False),
        (CODE + "\nA = 'text that counts'", False),
    ],
)
def test_code_is_the_same_where_it_does_the_same(other, same):
    assert (code_digest(CODE) == code_digest(other)) is same


def test_what_has_gone_counts_as_changed(tmp_path):
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "a.py").write_text("A = 1\n")
    here = used_digest(tmp_path, ["lib/a.py"])
    (tmp_path / "lib" / "a.py").unlink()
    assert used_digest(tmp_path, ["lib/a.py"]) != here


@pytest.mark.parametrize("text", ["", "{", "{}", "[1]", '"lib"'])
def test_a_damaged_record_of_what_was_used_is_none(tmp_path, text):
    (tmp_path / "used.json").write_text(text)
    assert read_used(tmp_path / "used.json") is None
    assert read_used(tmp_path / "absent.json") is None


def test_who_waits_for_whom():
    shipped, trained = readings(list(READS), shipped=True), readings(list(READS), shipped=False)
    assert shipped["02_statistics"] == set() and trained["02_statistics"] == {"01_training"}
    assert shipped["05_adaptation"] == {"02_statistics", "04_masking"}
    # nobody waits for results that lie there from before, whatever will be made of them
    again = readings([*READS, "own"], True, executed=["02_statistics", "04_masking"])
    assert again["05_adaptation"] == again["03_localization"] == set()
    assert again["own"] == {*READS} - {TRAINS}
    assert readings(list(READS), True, ["04_masking"])["05_adaptation"] == {"02_statistics"}
    # a part of the book waits for what is there; unknown notebooks for all before them
    assert readings(["04_masking", "05_adaptation"], True)["05_adaptation"] == {"04_masking"}
    assert readings(["a", "b", "c"], True) == {"a": set(), "b": {"a"}, "c": {"a", "b"}}


@pytest.mark.parametrize(
    ("cores", "gigabytes", "expected"),
    [(1, 24, (1, 1)), (2, 24, (2, 1)), (2, 3, (1, 2)), (16, 128, (3, 5)), (2, 0.5, (1, 2))],
)
def test_cores_and_memory_are_divided(monkeypatch, cores, gigabytes, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    free = SimpleNamespace(available=int(gigabytes * 2**30))
    monkeypatch.setattr(executing.psutil, "virtual_memory", lambda: free)
    assert share() == expected


def test_the_text_shown_is_the_sources_and_the_outputs_are_the_executions():
    parameters = new_code_cell("n = 1", metadata={"tags": ["parameters"]})
    source = new_notebook(
        cells=[new_markdown_cell("new"), parameters, new_code_cell("n"), new_markdown_cell("end")]
    )
    injected = new_code_cell("n = 2", metadata={"tags": ["injected-parameters"]})
    ran = new_code_cell("n", outputs=[{"output_type": "stream", "name": "stdout", "text": "2"}])
    told = with_text_of(new_notebook(cells=[new_markdown_cell("old"), parameters, injected, ran]), source)
    assert [cell.source for cell in told.cells] == ["new", "n = 1", "n = 2", "n", "end"]
    assert told.cells[3].outputs[0]["text"] == "2"


def test_every_chapter_reads_only_earlier_ones():
    names = sorted(path.stem for path in (project_root() / "notebooks").glob("*.ipynb"))
    assert names == list(READS)
    for number, read in enumerate(READS.values()):
        assert set(read) <= set(names[:number])


def test_a_notebook_that_got_a_cell_while_it_was_executed_is_one_sentence():
    executed = new_notebook(cells=[new_markdown_cell("old"), new_code_cell("1")])
    source = new_notebook(cells=[new_markdown_cell("old"), new_code_cell("1"), new_code_cell("2")])
    with pytest.raises(PatchSAEError, match="got another cell while the book was built: run the same"):
        with_text_of(executed, source)


def test_what_is_compiled_beside_the_library_is_not_what_was_used(tmp_path, monkeypatch):
    used = tmp_path / "used.json"
    monkeypatch.setenv(USED, str(used))
    source = f"""
import contextlib
for name in ("patchbook/data/concepts.json", "patchsae/sae/__pycache__/kernels.adam-1.py311.nbi"):
    with contextlib.suppress(FileNotFoundError):
        open("{project_root()}/lib/" + name).close()
"""
    notebook = new_notebook(cells=[new_code_cell(source)])
    nbformat.write(notebook, tmp_path / "opens.ipynb")
    run_notebook(tmp_path / "opens.ipynb", tmp_path / "out.ipynb", {})
    found = read_used(used)
    assert "lib/patchbook/data/concepts.json" in found and "lib/patchbook/used.py" in found
    assert not [name for name in found if "__pycache__" in name]
