"""Run one notebook with other parameters, checked: the only door to a notebook's execution.

Papermill alone runs on with the default when a parameter's name is unknown, and leaves the partial
notebook at the final path when a cell fails. This runner refuses the first and never does the
second.
"""

from __future__ import annotations

import argparse
import logging
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
import zmq
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager
from nbclient.exceptions import CellTimeoutError, DeadKernelError
from papermill.exceptions import PapermillExecutionError
from traitlets import default

from patchbook.lessons import put_first
from patchbook.parameters import check_parameters, list_parameters, read_notebook
from patchsae.runs.errors import PatchSAEError, printable
from patchsae.runs.stage import write_atomic
from patchsae.runs.stopping import Stopped, stoppable

USED = "PATCHSAE_USED"  # names the file that gets what an execution used: `patchbook.used`
WATCH_SECONDS = 0.2  # between two looks at the memory of a kernel


# papermill does not read `int | None`; `run_notebook` checks what is given itself
logging.getLogger("papermill").addFilter(lambda told: "unknown parameter" not in told.getMessage())


class NotebookFailed(RuntimeError):
    """Tell which cell of a notebook failed and where the partial notebook is kept."""


class Cost(NamedTuple):
    """What one execution took; `peak_mb` is of the kernel and the processes it started, together."""

    seconds: float
    peak_mb: float


class ThisInterpreter(AsyncKernelManager):
    """Start kernels with the running Python, whatever kernelspecs are installed on the machine."""

    @property
    def kernel_spec(self) -> KernelSpec:
        """Describe a kernel of this interpreter."""
        argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        if used := os.environ.get(USED):
            line = f"from patchbook.used import record; record({used!r})"
            argv.append(f"--IPKernelApp.exec_lines={[line]!r}")
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


def run_notebook(
    source: str | Path,
    out: str | Path,
    parameters: Mapping[str, Any] | None = None,
    cwd: str | Path | None = None,
) -> Cost:
    """Execute `source` with `parameters` and put the whole result at `out`, or nothing there.

    Where a cell fails the partial notebook is kept as `<out>.failed.ipynb`, and NotebookFailed
    names it. It is kept, too, where Ctrl-C stops the run.
    """
    source, out = Path(source), Path(out)
    if out.suffix != ".ipynb":
        raise PatchSAEError(f"The output {out} must end in .ipynb.")
    read_notebook(source)
    if out.exists() and out.samefile(source):
        raise PatchSAEError(f"The output {out} is the notebook itself: give another path.")
    failed = out.with_name(f"{out.stem}.failed.ipynb")
    if taken := [path for path in (out, failed) if path.is_dir()]:
        raise PatchSAEError(f"The output {taken[0]} is a folder: give another path, or move it away.")
    for path in (source, out):
        if printable(path) != str(path):  # both are written into the notebook
            raise PatchSAEError(f"The path {path} is not UTF-8, as a notebook must be: rename the folder.")
    if cwd is not None and not Path(cwd).is_dir():
        raise PatchSAEError(f"There is no folder {cwd} to run in: make it, or leave --cwd out.")
    checked = check_parameters(source, parameters or {})
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
        except KeyboardInterrupt:
            if temporary.stat().st_size:  # else no cell had begun
                shutil.copyfile(temporary, failed)
            raise
        cost = Cost(round(time.perf_counter() - started, 2), memory.peak_mb)
        _tidy(temporary, source, out, cost)

    write_atomic(out, execute)
    failed.unlink(missing_ok=True)
    return cost


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return 0, 1 (a cell failed), 2 (bad input), or 128 and a signal's number."""
    given, rest = _given(sys.argv[1:] if argv is None else list(map(str, argv)))
    arguments = _parser().parse_args(rest)
    if arguments.out is None and not arguments.parameters:
        _parser().error("OUT.ipynb is missing: say where the executed notebook goes")
    try:
        if arguments.parameters:
            print(list_parameters(arguments.notebook))
            return 0
        with stoppable(end_children):
            cost = run_notebook(
                arguments.notebook,
                arguments.out,
                given,
                arguments.cwd,
            )
    except PatchSAEError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except NotebookFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except Stopped as stop:
        kept = arguments.out.with_name(f"{arguments.out.stem}.failed.ipynb")
        print(f"error: {stop} stopped the run; what was done is in {kept}.", file=sys.stderr)
        return stop.code
    print(f"{arguments.out}: {cost.seconds:.1f} s, peak {cost.peak_mb:.0f} MB")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="patchsae run",
        description="Execute a notebook with other parameters; "
        "its result appears at OUT only if every cell ran.",
        epilog="Example: patchsae run notebooks/01_training.ipynb out.ipynb -p seed 1. "
        "A value is read by the type of the parameter's default: 3, 1e-4, true, none, text, or a "
        "list such as '[1, 2]'. Exit code: 0 done; 1 a cell failed, and the partial notebook is "
        "kept beside OUT as .failed.ipynb; 2 bad input; 130, 143 or 129 it was stopped by Ctrl-C or a "
        "scheduler, and the partial notebook is kept alike.",
    )
    parser.add_argument(
        "notebook", metavar="IN.ipynb", type=Path, help="the notebook to execute; never changed"
    )
    parser.add_argument(
        "--parameters", action="store_true", help="list the notebook's parameters and what they may be"
    )
    parser.add_argument(
        "out", metavar="OUT.ipynb", type=Path, nargs="?", help="where the executed notebook goes"
    )
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


def _given(words: list[str]) -> tuple[dict[str, str], list[str]]:
    """Take `-p NAME VALUE` out of a command line, as a value such as -1e-4 looks like an option."""
    found: dict[str, str] = {}
    rest: list[str] = []
    while words:
        if words[0] == "-p" and len(words) > 2:
            found[words[1]], words = words[2], words[3:]
        else:
            rest.append(words.pop(0))
    return found, rest


def end_children() -> None:
    # what asyncio tells of a kernel that was ended on purpose is no news
    logging.getLogger("asyncio").disabled = True
    # at once: asked to end, a kernel in the middle of a cell prints tracebacks of its own
    for process in psutil.Process().children(recursive=True):
        process.kill()


def _tidy(executed: Path, source: Path, out: Path, cost: Cost) -> None:
    notebook = nbformat.read(executed, as_version=4)
    # The widgets' state is carried by the outputs already; kept here it would be stored twice.
    notebook.metadata.pop("widgets", None)
    # A live view is dead without its kernel; where an output is a page too, that is what is kept.
    for output in (output for cell in notebook.cells for output in cell.get("outputs", ())):
        if "text/html" in output.get("data", {}):
            output["data"].pop("application/vnd.jupyter.widget-view+json", None)
    put_first(notebook)
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
        parent = process.parent()
        if parent and parent.cmdline() == process.cmdline():
            return 0  # about to become another program: until then its memory is its parent's
        return process.memory_info().rss
    except psutil.Error:  # it has ended meanwhile
        return 0


def _one_line(error: object) -> str:
    return " ".join(str(error).split())[:300]


if __name__ == "__main__":
    sys.exit(main())
