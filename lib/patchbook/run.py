"""Run one notebook with other parameters, checked: the only door to a notebook's execution.

Papermill alone runs on with the default when a parameter's name is unknown, and leaves the partial
notebook at the final path when a cell fails. This runner refuses the first and never does the
second.
"""

from __future__ import annotations

import argparse
import ast
import os
import shutil
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import nbformat
import papermill
import psutil
import yaml
import zmq
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager
from nbclient.exceptions import CellTimeoutError, DeadKernelError
from papermill.exceptions import PapermillExecutionError
from traitlets import default

from patchsae.runs.errors import PatchSAEError
from patchsae.runs.stage import write_atomic

WATCH_SECONDS = 0.2  # between two looks at the memory of a kernel


class NotebookFailed(RuntimeError):
    """Tell which cell of a notebook failed and where the partial notebook is kept."""


class Cost(NamedTuple):
    """What one execution took; `peak_mb` is of the kernel and the processes it started, together."""

    seconds: float
    peak_mb: float


class Parameter(NamedTuple):
    """One assignment of the parameters cell: its type expression (None: any) and its source."""

    name: str
    annotation: ast.expr | None
    source: str


class ThisInterpreter(AsyncKernelManager):
    """Start kernels with the running Python, whatever kernelspecs are installed on the machine."""

    @property
    def kernel_spec(self) -> KernelSpec:
        """Describe a kernel of this interpreter."""
        argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        return KernelSpec(
            argv=argv,
            display_name="Python 3",
            language="python",
            metadata={"supported_encryption": "curve"},
        )

    @default("transport_encryption")
    def _encrypt(self) -> str:
        # ipykernel warns on every start without it.
        return "auto" if zmq.has("curve") else "disabled"


class _Memory(threading.Thread):
    """Watch the resident memory of all processes below this one, as long as a with block takes."""

    def __init__(self):
        super().__init__(daemon=True)
        self.peak_mb, self._done = 0.0, threading.Event()

    def __enter__(self) -> _Memory:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self.join()

    def run(self) -> None:
        while not self._done.wait(WATCH_SECONDS):
            total = sum(map(_resident, psutil.Process().children(recursive=True)))
            self.peak_mb = max(self.peak_mb, round(total / 2**20, 1))


def read_parameters(notebook: Path) -> dict[str, Parameter]:
    """Read the names and types that a notebook's parameters cell declares.

    papermill.inspect_notebook reads line by line and so misses unions and values over several
    lines; the cell is Python, so Python's own parser reads it.
    """
    for cell in _read(notebook).cells:
        if cell.cell_type == "code" and "parameters" in cell.metadata.get("tags", ()):
            break
    else:
        raise PatchSAEError(
            f"{notebook} has no code cell tagged 'parameters', so it takes none: "
            "add the tag to the cell that sets them."
        )
    try:
        statements = ast.parse(cell.source).body
    except SyntaxError as error:
        raise PatchSAEError(
            f"The parameters cell of {notebook} is not valid Python "
            f"({error.msg}, line {error.lineno}): it may hold plain assignments only."
        ) from error
    found = {}
    for statement in statements:
        match statement:
            case ast.AnnAssign(target=ast.Name(id=name), annotation=annotation, value=ast.expr() as value):
                found[name] = Parameter(name, annotation, ast.unparse(value))
            case ast.Assign(targets=[ast.Name(id=name)], value=value):
                found[name] = Parameter(name, _annotation_of(value), ast.unparse(value))
    return found


def check_parameters(notebook: Path, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the given parameters with the types the notebook declares, or refuse them."""
    if not given:
        return {}
    declared = read_parameters(notebook)
    unknown = [name for name in given if name not in declared]
    if unknown:
        raise PatchSAEError(
            f"{notebook} has no parameter {_listed(unknown)}: "
            f"it takes {_listed(sorted(declared)) or 'none'}."
        )
    return {name: _typed(notebook, declared[name], value) for name, value in given.items()}


def run_notebook(
    source: str | Path,
    out: str | Path,
    parameters: Mapping[str, Any] | None = None,
    cwd: str | Path | None = None,
) -> Cost:
    """Execute `source` with `parameters` and put the whole result at `out`, or nothing there.

    Where a cell fails the partial notebook is kept as `<out>.failed.ipynb`, and NotebookFailed
    names it.
    """
    source, out = Path(source), Path(out)
    if out.suffix != ".ipynb":
        raise PatchSAEError(f"The output {out} must end in .ipynb.")
    _read(source)
    if out.exists() and out.samefile(source):
        raise PatchSAEError(f"The output {out} is the notebook itself: give another path.")
    if cwd is not None and not Path(cwd).is_dir():
        raise PatchSAEError(f"There is no folder {cwd} to run in: make it, or leave --cwd out.")
    checked = check_parameters(source, parameters or {})
    failed = out.with_name(f"{out.stem}.failed.ipynb")
    cost = Cost(0.0, 0.0)

    # Progress bars are for people; in a page they would be dead widgets.
    os.environ.setdefault("TQDM_DISABLE", "1")

    def execute(temporary: Path) -> None:
        nonlocal cost
        started = time.perf_counter()
        try:
            with _Memory() as memory:
                papermill.execute_notebook(
                    str(source),
                    str(temporary),
                    parameters=checked,
                    cwd=None if cwd is None else str(cwd),
                    kernel_name="python3",
                    language="python",
                    kernel_manager_class=ThisInterpreter,
                    progress_bar=sys.stderr.isatty(),
                )
        except (PapermillExecutionError, DeadKernelError, CellTimeoutError) as error:
            shutil.copyfile(temporary, failed)
            raise NotebookFailed(_reason(source, failed, error)) from error
        cost = Cost(round(time.perf_counter() - started, 2), memory.peak_mb)
        _tidy(temporary, source, out, cost)

    write_atomic(out, execute)
    failed.unlink(missing_ok=True)
    return cost


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return 0, 1 (a cell failed) or 2 (bad input)."""
    arguments = _parser().parse_args(argv)
    try:
        cost = run_notebook(
            arguments.notebook,
            arguments.out,
            {name: value for name, value in arguments.p},
            arguments.cwd,
        )
    except PatchSAEError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except NotebookFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{arguments.out}: {cost.seconds:.1f} s, peak {cost.peak_mb:.0f} MB")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m patchbook.run",
        description="Execute a notebook with other parameters; "
        "its result appears at OUT only if every cell ran.",
        epilog="Example: python -m patchbook.run notebooks/01_training.ipynb out.ipynb -p seed 1. "
        "A value is read by the type of the parameter's default: 3, 1e-4, true, none, text, or a "
        "list such as '[1, 2]'. Exit code: 0 done; 1 a cell failed, and the partial notebook is "
        "kept beside OUT as .failed.ipynb; 2 bad input.",
    )
    parser.add_argument(
        "notebook", metavar="IN.ipynb", type=Path, help="the notebook to execute; never changed"
    )
    parser.add_argument("out", metavar="OUT.ipynb", type=Path, help="where the executed notebook goes")
    parser.add_argument(
        "-p",
        nargs=2,
        action="append",
        default=[],
        metavar=("NAME", "VALUE"),
        help="set a parameter (repeatable)",
    )
    parser.add_argument("--cwd", type=Path, help="folder the notebook runs in (default: the current one)")
    return parser


def _read(notebook: Path) -> nbformat.NotebookNode:
    if not notebook.is_file():
        raise PatchSAEError(f"There is no notebook {notebook}: check the path.")
    try:
        return nbformat.read(notebook, as_version=4)
    # nbformat converts before it validates, so a foreign file may raise anything at all.
    except Exception as error:
        raise PatchSAEError(
            f"{notebook} cannot be read as a notebook ({type(error).__name__}): "
            "open and save it in JupyterLab."
        ) from error


def _typed(notebook: Path, parameter: Parameter, value: Any) -> Any:
    annotation = parameter.annotation
    for candidate in _readings(value) if isinstance(value, str) else [value]:
        if annotation is None or _fits(candidate, annotation):
            whole = isinstance(candidate, int) and not isinstance(candidate, bool)
            wants_float = isinstance(annotation, ast.Name) and annotation.id == "float"
            return float(candidate) if whole and wants_float else candidate
    raise PatchSAEError(
        f"Parameter {parameter.name!r} of {notebook} takes {ast.unparse(annotation)}, "
        f"not {value!r}: its default is {parameter.source}."
    )


def _readings(text: str) -> list[Any]:
    """List what a command-line value may mean, the text itself last.

    Python's reading comes first because YAML 1.1 takes 1e-4 for text.
    """
    readings = []
    for read, error in (
        (ast.literal_eval, (ValueError, SyntaxError)),
        (yaml.safe_load, yaml.YAMLError),
    ):
        try:
            value = read(text)
        except error:
            continue
        if not isinstance(value, str):
            readings.append(value)
    return [*readings, text]


def _fits(value: Any, annotation: ast.expr) -> bool:
    match annotation:
        case ast.Constant(value=None):
            return value is None
        case ast.Constant(value=str() as quoted):
            return _fits(value, ast.parse(quoted, mode="eval").body)
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            return _fits(value, left) or _fits(value, right)
        case ast.Subscript(value=ast.Name(id="list"), slice=element):
            return isinstance(value, (list, tuple)) and all(_fits(item, element) for item in value)
        case ast.Name(id="bool"):
            return isinstance(value, bool)
        case ast.Name(id="int"):
            return isinstance(value, int) and not isinstance(value, bool)
        case ast.Name(id="float"):
            return isinstance(value, (int, float)) and not isinstance(value, bool)
        case ast.Name(id="str"):
            return isinstance(value, str)
        case ast.Name(id="list" | "tuple"):
            return isinstance(value, (list, tuple))
        case ast.Name(id="dict"):
            return isinstance(value, dict)
    # A type the runner cannot judge (Literal, Path, a class) is left to the notebook.
    return True


def _annotation_of(value: ast.expr) -> ast.expr | None:
    """Derive the type expression of a literal default; None and computed values may be anything."""
    try:
        default = ast.literal_eval(value)
    except ValueError:
        return None
    if default is None:
        return None
    name = type(default).__name__
    if isinstance(default, list):
        kinds = {type(item).__name__ for item in default}
        name = f"list[{kinds.pop()}]" if len(kinds) == 1 else "list"
    return ast.parse(name, mode="eval").body


def _tidy(executed: Path, source: Path, out: Path, cost: Cost) -> None:
    notebook = nbformat.read(executed, as_version=4)
    # The widgets' state is carried by the outputs already; kept here it would be stored twice.
    notebook.metadata.pop("widgets", None)
    # A live view is dead without its kernel; where an output is a page too, that is what is kept.
    for output in (output for cell in notebook.cells for output in cell.get("outputs", ())):
        if "text/html" in output.get("data", {}):
            output["data"].pop("application/vnd.jupyter.widget-view+json", None)
    notebook.metadata["patchsae"] = cost._asdict()
    notebook.metadata["papermill"].update(input_path=str(source), output_path=str(out))
    nbformat.write(notebook, executed)


def _reason(source: Path, failed: Path, error: Exception) -> str:
    if isinstance(error, PapermillExecutionError):
        value = _one_line(error.evalue)
        what = f"Cell {error.exec_count} of {source} failed with {error.ename}: {value}"
    else:
        what = f"The kernel of {source} died (out of memory?): {_one_line(error)}"
    return f"{what.rstrip('.')}; the partial notebook is {failed}."


def _resident(process: psutil.Process) -> int:
    try:
        return process.memory_info().rss
    except psutil.Error:  # it has ended meanwhile
        return 0


def _listed(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names))


def _one_line(error: object) -> str:
    return " ".join(str(error).split())[:300]


if __name__ == "__main__":
    sys.exit(main())
