"""Real commands, ended by every signal at random moments: nothing is lost, left behind or half there."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import psutil
from attacks import Tally
from nbformat.v4 import new_code_cell, new_notebook
from safetensors.torch import load_file

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGKILL)
DRIVER = Path(__file__).parent.parent / "crash.py"


def notebooks(count: int, seed: int, folder: Path) -> Tally:
    """Runs of a notebook that are ended by SIGTERM, SIGINT, SIGHUP and SIGKILL."""
    draw, tally, source = random.Random(seed), Tally(), folder / "in.ipynb"
    first = new_code_cell("n = 1", metadata={"tags": ["parameters"]})
    nbformat.write(new_notebook(cells=[first, new_code_cell("import time\ntime.sleep(60)")]), source)
    for number in range(count):
        here, chosen = folder / str(number), SIGNALS[number % len(SIGNALS)]
        here.mkdir()
        command = [sys.executable, "-m", "patchbook.run", source, here / "out.ipynb"]
        run = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
        begun = time.monotonic() + 120
        while not list(here.iterdir()) and run.poll() is None and time.monotonic() < begun:
            time.sleep(0.05)  # it has not yet said that it will handle signals
        time.sleep(draw.uniform(0, 8))
        below = psutil.Process(run.pid).children(recursive=True)
        run.send_signal(chosen)
        said = run.communicate(timeout=120)[1]
        left = {path.name for path in here.iterdir()}
        alive = psutil.wait_procs(below, timeout=30)[1]
        wanted = -9 if chosen is signal.SIGKILL else 128 + chosen
        whole = run.returncode == wanted and not alive and "out.ipynb" not in left
        # what SIGKILL leaves half-written is hidden, and removed by the next run
        tidy = chosen is signal.SIGKILL or left <= {"out.failed.ipynb"}
        outcome = "traceback" if "Traceback" in said else "right" if whole and tidy else "garbage"
        tally.add(
            outcome, f"{chosen.name}: code {run.returncode}, left {left}, alive {alive}, said {said[-150:]}"
        )
    return tally


def trainings(count: int, seed: int, folder: Path) -> Tally:
    """Trainings and descriptions that are killed five times each, and then go on to the same bits."""
    tally = Tally()
    for number in range(count):
        options, here = ({"execution": "sparse"}, {"task": "describe"})[number % 2], folder / str(number)
        here.mkdir()
        command = [sys.executable, DRIVER, here, json.dumps(options), str(seed + number)]
        done = subprocess.run(command, capture_output=True, text=True)
        told = json.loads(done.stdout or "{}")
        right, differs = done.returncode == 0 and told.get("whole") == told.get("status") == 0, []
        for one in sorted(here.glob("whole/*/*.safetensors")):
            (other,) = here.glob(f"cut/*/{one.name}")
            a, b = load_file(one), load_file(other)
            differs += [name for name in a.keys() | b.keys() if name not in a or name not in b]
            differs += [name for name in a.keys() & b.keys() if not a[name].equal(b[name])]
        for _ in told.get("died_at", [0]):
            about = (
                f"{options}: code {done.returncode}, {told}, other bits in {differs}: {done.stderr[-300:]}"
            )
            tally.add("right" if right and not differs else "garbage", about)
    return tally
