"""Bring the executed notebooks up to date: what changed is run, several at a time; the rest is left."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any, NamedTuple

import nbformat
import psutil

from patchbook.lessons import put_first
from patchbook.order import READS, readings
from patchbook.parameters import check_parameters, read_notebook
from patchbook.run import USED, NotebookFailed
from patchbook.used import read_used, used_digest
from patchsae.runs.errors import PatchSAEError
from patchsae.runs.stage import Stage, machine, versions, write_json
from patchsae.runs.stopping import end_with_parent

MEMORY = 2 * 2**30  # bytes that one chapter may want
WIDTH = 3  # chapters that can run side by side at most, as they read each other


class Executed(NamedTuple):
    """An executed notebook, and the manifest of the execution."""

    path: Path
    manifest: dict[str, Any]


class Share(NamedTuple):
    """How many chapters run at a time, and how many cores each gets."""

    chapters: int
    threads: int


def share() -> Share:
    """Divide the cores and the free memory of this machine among chapters."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    at_once = max(1, min(cores, WIDTH, psutil.virtual_memory().available // MEMORY))
    return Share(at_once, max(1, cores // at_once))


def execute(
    root: Path, build: Path, names: list[str], parameters: Mapping[str, Mapping[str, Any]], shipped: bool
) -> dict[str, Executed]:
    """Execute those of the notebooks `names` that changed; return all of them, in this order.

    An execution depends on the notebook's code cells (not on its text), its parameters, the package
    versions, and what it used the last time (`patchbook.used`). What chapters leave in `results` lies there
    under the hash of what it was made from, so that they wait for each other only to spare work, and not
    for one that was executed here before; a notebook that `patchbook.order` does not know depends on all
    before it.

    parameters: of a notebook by its name; those not there keep the notebook's own.
    shipped: the autoencoder is not trained by the first of them.
    Raises PatchSAEError and NotebookFailed; what has been executed meanwhile is kept.
    """
    reads, made = readings(names, shipped), {}
    readers = Counter(read for before in reads.values() for read in before)
    ran = [name for name in names if read_used(_used_file(build, name)) is not None]
    todo = TopologicalSorter(readings(names, shipped, ran))
    todo.prepare()
    waiting: list[_Chapter] = []
    running: dict[Future, _Chapter] = {}
    own = share()

    def take(chapter: _Chapter) -> None:
        made[chapter.name] = chapter.result()
        todo.done(chapter.name)

    with ThreadPoolExecutor(own.chapters) as pool:
        try:
            while todo.is_active():
                for name in todo.get_ready():
                    read = () if name in READS else sorted(reads[name])
                    before = [made[other].manifest["inputs"] for other in read]
                    chapter = _Chapter(root, build, name, parameters.get(name, {}), before)
                    if chapter.done:
                        print(f"{name}: unchanged", flush=True)
                        take(chapter)
                    else:
                        waiting.append(chapter)
                # the longest chain first: who is waited for most, then who has waited for most
                waiting.sort(key=lambda one: (-readers[one.name], -len(reads[one.name]), one.name))
                while waiting and len(running) < own.chapters:
                    chapter = waiting.pop(0)
                    print(f"{chapter.name}: running …", flush=True)
                    running[pool.submit(chapter.run, own.threads)] = chapter
                for future in wait(running, return_when=FIRST_COMPLETED).done if running else ():
                    chapter = running.pop(future)
                    future.result()
                    take(chapter)
                    print(f"{chapter.name}: {chapter.cost()}", flush=True)
        except (PatchSAEError, NotebookFailed):
            wait(running)  # what still runs is finished, and kept
            raise
        except BaseException:
            for chapter in running.values():
                chapter.stop()
            raise
    return {name: made[name] for name in names}


def outdated(
    root: Path, build: Path, names: list[str], parameters: Mapping[str, Mapping[str, Any]]
) -> list[str]:
    """List those of the notebooks that `execute` would execute."""
    reads, made = readings(names, True), {}
    for name in TopologicalSorter(reads).static_order():
        read = () if name in READS else sorted(reads[name])
        if made.keys() >= set(read):
            before = [made[other] for other in read]
            chapter = _Chapter(root, build, name, parameters.get(name, {}), before)
            if chapter.done:
                made[name] = chapter.stage.manifest["inputs"]
    return [name for name in names if name not in made]


def _used_file(build: Path, name: str) -> Path:
    """Name the file that says what the last execution of a notebook used."""
    return build / "notebooks" / f"{name}.used.json"


class _Chapter:
    """One notebook, and the stage folder of its last execution with these inputs."""

    def __init__(self, root: Path, build: Path, name: str, given: Mapping[str, Any], before: list):
        self.root, self.name, self.folder, self.before = root, name, build / "notebooks", before
        self.source = root / "notebooks" / f"{name}.ipynb"
        if not self.source.is_file():
            raise PatchSAEError(f"_toc.yml names {name}, but there is no notebooks/{name}.ipynb: add it.")
        self.process: subprocess.Popen | None = None
        self.given = check_parameters(self.source, given)
        self.used_file = _used_file(build, name)
        self.stage = self._open(read_used(self.used_file) or [])

    def _open(self, used: list[str]) -> Stage:
        inputs = {
            "code": code_of(read_notebook(self.source)),
            "parameters": self.given,
            "versions": versions(),
            "before": self.before,
            "used": used_digest(self.root, used),
        }
        return Stage.open(self.folder, self.name, inputs, version=2)

    @property
    def executed(self) -> Path:
        return self.stage.path / f"{self.name}.ipynb"

    @property
    def done(self) -> bool:
        return self.stage.done and self.executed.is_file()

    def result(self) -> Executed:
        return Executed(self.executed, self.stage.manifest)

    def cost(self) -> str:
        facts = self.stage.manifest["facts"]
        return f"{facts['seconds']:.1f} s, peak {facts['peak_mb']:.0f} MB"

    def stop(self) -> None:
        """End the execution, which keeps what was done as a failed notebook does."""
        if self.process:
            self.process.terminate()
            self.process.wait()

    def run(self, threads: int) -> None:
        """Execute in a process of its own, and name the result by what it used."""
        used = self.stage.path / "used.json"
        used.unlink(missing_ok=True)
        command = [sys.executable, "-m", "patchbook.run", self.source, self.executed, "--cwd", self.root]
        for name, value in self.given.items():
            command += ["-p", name, value]
        threads = str(threads)
        own = {USED: str(used), "OMP_NUM_THREADS": threads, "NUMBA_NUM_THREADS": threads}
        self.process = subprocess.Popen(
            [str(word) for word in command],
            env=os.environ | own,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=end_with_parent,  # even where this build is killed
        )
        told = self.process.communicate()[1]
        if code := self.process.returncode:
            reason = (told.strip().splitlines() or [f"{self.name} ended with {code}"])[-1]
            raise (PatchSAEError if code == 2 else NotebookFailed)(reason.removeprefix("error: "))
        # an idle kernel that is told to end says so
        sys.stderr.writelines(line for line in told.splitlines(True) if "KeyboardInterrupt" not in line)
        executed, found = self.executed, read_used(used)
        if found is None:
            raise PatchSAEError(f"{self.name} did not write {used}: is this library the one installed?")
        write_json(self.used_file, found)
        self.stage = self._open(found)
        if self.executed != executed:
            os.replace(executed, self.executed)
            used.unlink()
            with contextlib.suppress(OSError):  # another build may have something there
                executed.parent.rmdir()
        cost = nbformat.read(self.executed, as_version=4).metadata["patchsae"]
        self.stage.finish(f"{self.name}.ipynb", **cost, machine=machine())


def code_of(notebook: nbformat.NotebookNode) -> list[list]:
    """Return what of a notebook decides its outputs: source and tags of each code cell."""
    cells = (cell for cell in notebook.cells if cell.cell_type == "code")
    return [[cell.source, sorted(cell.metadata.get("tags", ()))] for cell in cells]


def with_text_of(executed: nbformat.NotebookNode, source: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Return an executed notebook with the text, as it is now, of the notebook that it was made from.

    It opens with what it has learned, as its execution did. Raises PatchSAEError where that notebook has
    got a cell of code since.
    """
    ran = [cell for cell in executed.cells if cell.cell_type == "code"]
    cells, injected = [], [cell for cell in ran if "injected-parameters" in cell.metadata.get("tags", ())]
    ran = iter([cell for cell in ran if cell not in injected])
    for cell in source.cells:
        if cell.cell_type == "code":
            done = next(ran, None)
            if done is None:
                raise PatchSAEError(
                    "a notebook got another cell while the book was built: run the same command again."
                )
            cell.outputs, cell.execution_count = done.outputs, done.execution_count
        cells.append(cell)
        if "parameters" in cell.metadata.get("tags", ()):
            cells += injected
    executed.cells = cells
    put_first(executed)
    return executed
