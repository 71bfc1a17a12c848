"""The checked runner, on tiny notebooks that papermill really executes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import nbformat
import psutil
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from patchbook.parameters import check_parameters
from patchbook.run import _resident, main
from patchsae.runs.errors import PatchSAEError

PARAMETERS = '''"""Sizes and places."""
steps = 10  # how long
rate: float = 1e-3
name = "openmoji"
fast = False
ks = [1, 2]
limit: int | None = None
anything = None
product = 2 * 3
long = [
    "a",  # several lines
    "b",
]
'''


@pytest.fixture
def notebook(tmp_path):
    """Return a maker of notebooks: parameters first, then the given cells."""

    def make(*cells: str, parameters: str | None = PARAMETERS):
        tagged = [new_code_cell(parameters, metadata={"tags": ["parameters"]})] if parameters else []
        made = new_notebook(cells=[new_markdown_cell("# Title"), *tagged, *map(new_code_cell, cells)])
        path = tmp_path / "in.ipynb"
        nbformat.write(made, path)
        return path

    return make


def texts(path) -> str:
    """Return everything an executed notebook printed."""
    cells = nbformat.read(path, as_version=4).cells
    return "".join(o.get("text", "") for c in cells if c.cell_type == "code" for o in c.outputs)


def test_success_puts_the_whole_notebook_at_out(notebook, tmp_path, capsys):
    out = tmp_path / "new" / "out.ipynb"
    source = notebook("import sys; print(steps, rate, ks, name, sys.executable)")
    argv = [
        str(source),
        str(out),
        "-p",
        "steps",
        "3",
        "-p",
        "rate",
        "1e-4",
        "-p",
        "ks",
        "[5]",
        "-p",
        "name",
        "1",
    ]
    assert main(argv) == 0
    assert texts(out) == f"3 0.0001 [5] 1 {sys.executable}\n"
    metadata = nbformat.read(out, as_version=4).metadata
    assert metadata.patchsae.seconds > 0 and metadata.patchsae.peak_mb > 10
    assert metadata.papermill.output_path == str(out) and "widgets" not in metadata
    assert [p.name for p in out.parent.iterdir()] == ["out.ipynb"]
    assert "out.ipynb" in capsys.readouterr().out


def test_widget_state_is_not_carried_twice(notebook, tmp_path):
    source = notebook("import ipywidgets; ipywidgets.IntSlider()")
    assert main([str(source), str(tmp_path / "out.ipynb")]) == 0
    executed = nbformat.read(tmp_path / "out.ipynb", as_version=4)
    assert "widgets" not in executed.metadata
    assert "widget-view" in json.dumps(executed)


def test_a_failing_cell_leaves_nothing_at_out(notebook, tmp_path, capsys):
    out = tmp_path / "out.ipynb"
    assert main([str(notebook("print('before')", "1 / 0")), str(out)]) == 1
    assert not out.exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.ipynb", "out.failed.ipynb"]
    assert "before" in texts(tmp_path / "out.failed.ipynb")
    told = capsys.readouterr().err
    assert "ZeroDivisionError" in told and str(tmp_path / "out.failed.ipynb") in told


def test_a_failing_cell_leaves_the_last_good_result(notebook, tmp_path):
    out = tmp_path / "out.ipynb"
    assert main([str(notebook("print(10 // steps)")), str(out)]) == 0
    before = out.read_bytes()
    assert main([str(notebook("print(10 // steps)")), str(out), "-p", "steps", "0"]) == 1
    assert out.read_bytes() == before
    assert main([str(notebook("print(10 // steps)")), str(out)]) == 0
    assert not (tmp_path / "out.failed.ipynb").exists()


def test_a_killed_kernel_is_one_sentence(notebook, tmp_path, capsys):
    source = notebook("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    assert main([str(source), str(tmp_path / "out.ipynb")]) == 1
    assert not (tmp_path / "out.ipynb").exists()
    assert "died" in capsys.readouterr().err


def test_a_kernelspec_installed_elsewhere_is_not_taken(notebook, tmp_path):
    spec = tmp_path / "jupyter" / "kernels" / "python3"
    spec.mkdir(parents=True)
    argv = {
        "argv": ["/nowhere/python", "{connection_file}"],
        "display_name": "x",
        "language": "python",
    }
    (spec / "kernel.json").write_text(json.dumps(argv))
    command = [
        sys.executable,
        "-m",
        "patchbook.run",
        str(notebook("print(1)")),
        str(tmp_path / "out.ipynb"),
    ]
    env = os.environ | {"JUPYTER_PATH": str(tmp_path / "jupyter")}
    ran = subprocess.run(command, env=env, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


def test_cwd_is_where_the_notebook_runs(notebook, tmp_path):
    folder = tmp_path / "there"
    folder.mkdir()
    source = notebook("import os; print(os.getcwd())")
    assert main([str(source), str(tmp_path / "out.ipynb"), "--cwd", str(folder)]) == 0
    assert texts(tmp_path / "out.ipynb").strip() == str(folder)


def test_an_unknown_parameter_is_refused_with_the_valid_names(notebook, tmp_path, capsys):
    assert main([str(notebook()), str(tmp_path / "out.ipynb"), "-p", "step", "1"]) == 2
    told = capsys.readouterr().err
    assert "no parameter 'step'" in told
    for name in ("'anything'", "'steps'", "'long'", "'limit'"):
        assert name in told
    assert not (tmp_path / "out.ipynb").exists()


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("steps", "3", 3),
        ("steps", "-3", -3),
        ("rate", "1", 1.0),
        ("rate", "1e-4", 1e-4),
        ("name", "7", "7"),
        ("name", "yes", "yes"),
        ("name", "None", "None"),
        ("fast", "true", True),
        ("fast", "False", False),
        ("ks", "[3]", [3]),
        ("ks", "[]", []),
        ("long", "[x, y]", ["x", "y"]),
        ("limit", "null", None),
        ("limit", "None", None),
        ("limit", "4", 4),
        ("anything", "0.5", 0.5),
        ("anything", "text", "text"),
        ("product", "7", 7),
    ],
)
def test_a_value_is_read_by_the_type_of_the_default(notebook, name, text, value):
    read = check_parameters(notebook(), {name: text})[name]
    assert read == value and type(read) is type(value)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("steps", "many"),
        ("steps", "1.5"),
        ("steps", "true"),
        ("rate", "fast"),
        ("fast", "1"),
        ("ks", "3"),
        ("ks", "[1, two]"),
        ("limit", "some"),
    ],
)
def test_a_wrong_type_is_one_sentence(notebook, tmp_path, capsys, name, text):
    assert main([str(notebook()), str(tmp_path / "out.ipynb"), "-p", name, text]) == 2
    told = capsys.readouterr().err
    assert f"Parameter '{name}'" in told and "its default is" in told and len(told.splitlines()) == 1


def test_typed_values_from_python_are_checked_too(notebook):
    assert check_parameters(notebook(), {"rate": 1, "ks": (3, 4)}) == {"rate": 1.0, "ks": [3, 4]}
    with pytest.raises(PatchSAEError, match="takes int"):
        check_parameters(notebook(), {"steps": 0.5})


def test_bad_paths_are_one_sentence(notebook, tmp_path, capsys):
    source, out = str(notebook()), str(tmp_path / "out.ipynb")
    assert main([str(tmp_path / "none.ipynb"), out]) == 2
    assert "no notebook" in capsys.readouterr().err
    assert main([source, source]) == 2
    assert "another path" in capsys.readouterr().err
    assert main([source, str(tmp_path / "out.html")]) == 2
    assert ".ipynb" in capsys.readouterr().err
    assert main([source, out, "--cwd", str(tmp_path / "none")]) == 2
    assert "no folder" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "not json", "[]", "{}", '{"cells": 3}'])
def test_what_is_not_a_notebook_is_one_sentence(tmp_path, capsys, text):
    (tmp_path / "in.ipynb").write_text(text)
    for extra in ([], ["-p", "a", "1"]):
        assert main([str(tmp_path / "in.ipynb"), str(tmp_path / "out.ipynb"), *extra]) == 2
        assert "cannot be read as a notebook" in capsys.readouterr().err


BOOK = """scale: str = "embedded"
results: str = "results"
k: int = 10  # kept
l1: float | None = None
blocks: list[int] = [2]
seed: int = 0
tau: float = 0.2
"""


@pytest.mark.parametrize(
    "given, told",
    [
        ({"k": "-7"}, "k=-7 must be 1 or more"),
        ({"k": "0", "blocks": "[0]"}, r"k=0 must be 1 or more; blocks=\[0\] must be from 1 to 64"),
        ({"tau": "inf"}, r"'tau' of .* takes float \(0 or more\), not 'inf'"),
        ({"tau": float("inf")}, "tau=inf must be 0 or more"),
        ({"l1": "nan"}, r"'l1' of .* takes float \| None \(0 or more\), not 'nan'"),
        ({"scale": "papr"}, "scale='papr' must be one of 'embedded', 'paper'"),
        ({"l1": "-1"}, "l1=-1.0 must be 0 or more"),
        ({"seed": "010"}, "'seed' of .* takes int .*, not '010'"),
        ({"seed": "1:30"}, "'seed' of .* takes int .*, not '1:30'"),
    ],
)
def test_values_out_of_range_are_refused_before_a_kernel_starts(notebook, given, told):
    with pytest.raises(PatchSAEError, match=told):
        check_parameters(notebook(parameters=BOOK), given)


def test_parameters_are_listed_with_what_they_may_be(notebook, capsys):
    assert main([str(notebook(parameters=BOOK)), "--parameters"]) == 0
    assert "k: int = 10  # 1 or more; kept\n" in capsys.readouterr().out


def test_a_negative_number_with_an_exponent_is_a_value(notebook, tmp_path):
    out = tmp_path / "out.ipynb"
    assert main([str(notebook("print(rate)")), str(out), "-p", "rate", "-1e-4"]) == 0
    assert texts(out) == "-0.0001\n"


def test_a_notebook_without_a_parameters_cell_takes_none(notebook, tmp_path, capsys):
    source, out = notebook("print(1)", parameters=None), tmp_path / "out.ipynb"
    assert main([str(source), str(out), "-p", "steps", "1"]) == 2
    assert "tagged 'parameters'" in capsys.readouterr().err
    assert main([str(source), str(out)]) == 0


@pytest.mark.parametrize(("declared", "text", "value"), [
    ("sizes: list[int] = [1]", "1,50", [1, 50]), ("sizes: list[int] = [1]", "(1, 50)", [1, 50]),
    ("sizes: tuple = (1, 2)", "[3, 4]", (3, 4)), ("sizes = (1, 2)", "(3, 4)", (3, 4)),
    ("sizes: tuple[int, ...] = ()", "3,4,5", (3, 4, 5)),
    ("sizes: tuple[int, str] = (1, 'a')", "[2, 'b']", (2, "b")),
    ("sizes: list[int] | None = None", "(3,)", [3]),
])  # fmt: skip
def test_lists_and_tuples_become_what_is_declared(notebook, declared, text, value):
    found = check_parameters(notebook(parameters=declared), {"sizes": text})["sizes"]
    assert found == value and type(found) is type(value)


def test_a_tuple_arrives_as_one(notebook, tmp_path):
    source = notebook("print(pair, none)", parameters="pair: tuple = (1, 2)\nnone: tuple = (1,)")
    assert main([str(source), str(tmp_path / "o.ipynb"), "-p", "pair", "(3, 'a')", "-p", "none", "()"]) == 0
    assert texts(tmp_path / "o.ipynb") == "(3, 'a') ()\n"


@pytest.mark.parametrize("text", ["[1, 2, 3]", "(1, 2)", "5"])
def test_a_tuple_of_other_parts_is_refused(notebook, text):
    with pytest.raises(PatchSAEError, match=r"takes tuple\[int, str\], not"):
        check_parameters(notebook(parameters="pair: tuple[int, str] = (1, 'a')"), {"pair": text})


@pytest.mark.parametrize("name", ["out.ipynb", "out.failed.ipynb"])
def test_an_output_that_is_a_folder_is_refused_before_a_cell_runs(notebook, tmp_path, capsys, name):
    (tmp_path / name).mkdir()
    ran = tmp_path / "ran"
    assert main([str(notebook(f"open({str(ran)!r}, 'w')")), str(tmp_path / "out.ipynb")]) == 2
    assert f"{name} is a folder: give another path" in capsys.readouterr().err and not ran.exists()


def test_a_name_that_is_not_utf8_is_one_sentence(notebook, tmp_path, capsys):
    place = os.fsdecode(os.fsencode(tmp_path) + b"/donn\xe9es")
    source = notebook()
    os.mkdir(place)
    for argv in ([f"{place}/o.ipynb"], [str(tmp_path / "o.ipynb"), "-p", "name", place]):
        assert main([str(source), *argv]) == 2
        said = capsys.readouterr().err
        assert r"donn\xe9es" in said and "is not UTF-8" in said and said.count("\n") == 1


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP"])
def test_a_run_that_is_stopped_keeps_what_was_done(notebook, tmp_path, name):
    mark, out = tmp_path / "mark", tmp_path / "out" / "o.ipynb"
    waiting = f"import os, time; open({str(mark)!r}, 'w').write(f'{{os.getpid()}} '); time.sleep(300)"
    source = notebook("print('first')", waiting)
    command = [sys.executable, "-m", "patchbook.run", str(source), str(out)]
    run = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while not (mark.exists() and mark.read_text().endswith(" ")):
        assert run.poll() is None
        time.sleep(0.1)
    number = getattr(signal, name)
    run.send_signal(number)
    _, said = run.communicate(timeout=120)
    assert run.returncode == 128 + number and f"error: {name} stopped the run; what was done is in" in said
    assert "Traceback" not in said and not psutil.pid_exists(int(mark.read_text()))
    assert [path.name for path in out.parent.iterdir()] == ["o.failed.ipynb"]
    assert texts(out.with_name("o.failed.ipynb")) == "first\n"


FORKS = """
import os, sys, time
held = bytearray(200_000_000)
if not os.fork():
    time.sleep(60)
os.execvp("sleep", ["sleep", "60"]) if sys.argv[1] == "other" and not os.fork() else time.sleep(60)
"""


def test_a_process_about_to_become_another_does_not_count_twice():
    """For a moment a kernel that starts a program is there twice, with all of its memory."""
    started = subprocess.Popen([sys.executable, "-c", FORKS, "other"])
    try:
        kernel = psutil.Process(started.pid)
        while len(children := kernel.children()) < 2 or not any("sleep" in c.name() for c in children):
            time.sleep(0.05)
        assert sorted(c.name() == "sleep" for c in children) == [False, True]
        for child in children:
            assert (_resident(child) > 0) == (child.name() == "sleep")
        assert _resident(kernel) > 190_000_000
    finally:
        for process in (*psutil.Process(started.pid).children(recursive=True), started):
            process.kill()
        started.wait()
