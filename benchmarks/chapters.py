"""Where the seconds of each chapter go: a table, and benchmarks/chapters.json.

    .venv/bin/python benchmarks/chapters.py                         # all chapters, results kept
    .venv/bin/python benchmarks/chapters.py --fresh 02_statistics   # one, from nothing

Each notebook is run by `patchbook.run` under py-spy, which looks at all of its processes twenty times a
second. A sample counts for the innermost kind of work that its stack names, and for as many seconds as it
stands for: a chapter of two busy processes has twice the wall time.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from patchbook.order import READS
from patchsae.runs.stage import machine, project_root, write_json

RATE = 20  # samples a second
# By file of the stack, the innermost match wins.
KINDS = {
    "drawing": r"matplotlib|scipy/stats/_kde",
    "rendering": r"patchbook/scenes|resvg",
    "bootstrap": r"runs/intervals",
    "text tower": r"encode_text|prompt_text",
    "tail": r"clip/tail|Backbone\.finish",
    "tower": r"clip/backbone|adaptation/prompts",
    "SAE": r"patchsae/sae|training/trainer",
    "masking": r"patchsae/masking",
    "statistics": r"patchsae/latents",
    "results on disk": r"runs/stage|zarr|safetensors",
    "imports": r"importlib",
    "kernel and waiting": r"zmq|tornado|asyncio|selectors|threading|multiprocessing",
}
REST = "other"


def kind_of(stack: str) -> str:
    """Name the kind of work of one sampled stack, outermost frame first."""
    for frame in reversed(stack.split(";")):
        for kind, pattern in KINDS.items():
            if re.search(pattern, frame):
                return kind
    return REST


def measure(chapter: str, results: str) -> dict[str, float]:
    """Run one chapter; return the seconds of each kind of work, and of the clock as 'wall'."""
    with tempfile.TemporaryDirectory() as folder:
        raw, out = Path(folder, "samples"), Path(folder, f"{chapter}.ipynb")
        command = [Path(sys.executable).with_name("py-spy"), "record", "--subprocesses", "--rate", RATE]
        command += ["--format", "raw", "--nonblocking", "--output", raw, "--", sys.executable]
        command += ["-m", "patchbook.run", f"notebooks/{chapter}.ipynb", out, "-p", "results", results]
        started = time.perf_counter()
        ran = subprocess.run(
            [str(word) for word in command], cwd=project_root(), capture_output=True, text=True
        )
        wall = time.perf_counter() - started
        if not out.is_file():
            sys.exit(f"{chapter} was not executed:\n{ran.stdout}{ran.stderr}")
        seconds = Counter()
        for line in raw.read_text(encoding="utf-8", errors="replace").splitlines():
            stack, samples = line.rsplit(" ", 1)
            seconds[kind_of(stack)] += int(samples) / RATE
    return {"wall": round(wall, 1)} | {kind: round(seconds[kind], 1) for kind in (*KINDS, REST)}


def main() -> None:
    """Measure the chapters asked for, print the table, write the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("chapters", nargs="*", default=list(READS), help="by default all")
    parser.add_argument(
        "--fresh", action="store_true", help="compute everything anew, in a folder of its own"
    )
    given = parser.parse_args()
    results = "results/measured" if given.fresh else "results"
    if given.fresh:
        shutil.rmtree(project_root() / results, ignore_errors=True)
    table = {chapter: measure(chapter, results) for chapter in given.chapters}
    for kind in ("wall", *KINDS, REST):
        print(f"{kind:20}", *(f"{row[kind]:8.1f}" for row in table.values()))
    print(f"{'':20}", *(f"{chapter[:8]:>8}" for chapter in table))
    found = {"machine": machine(), "fresh": given.fresh, "seconds": table}
    write_json(project_root() / "benchmarks" / "chapters.json", found)


if __name__ == "__main__":
    main()
