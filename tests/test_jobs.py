"""Processes that share tasks: in any number they do the same, and a bad end is told."""

import os
from pathlib import Path

import pytest
import torch

from patchsae.runs.errors import PatchSAEError
from patchsae.runs.jobs import workers


def note(folder: Path, number: int) -> None:
    (folder / str(number)).write_text(f"{os.getpid()} {torch.get_num_threads()}")


def refuse(folder: Path, number: int) -> None:
    raise PatchSAEError(f"number {number} is refused.")


def die() -> None:
    os._exit(1)


def test_tasks_are_done_by_processes_that_stay_until_one_dies(tmp_path):
    with pytest.raises(PatchSAEError, match="jobs=2 processes died"), workers(2, progress=False) as run:
        run("first", note, [(tmp_path, number) for number in range(3)])
        run("second", note, [(tmp_path, number) for number in range(3, 6)])
        with pytest.raises(PatchSAEError, match="number 0 is refused"):
            run("refused", refuse, [(tmp_path, 0)])
        run("dead", die, [()])
    said = [(tmp_path / str(number)).read_text().split() for number in range(6)]
    assert len({process for process, _ in said} - {str(os.getpid())}) in (1, 2)
    assert {int(threads) for _, threads in said} == {max(1, torch.get_num_threads() // 2)}


def test_one_job_runs_here(tmp_path):
    with workers(1, progress=False) as run:
        run("here", note, [(tmp_path, 0)])
    assert (tmp_path / "0").read_text() == f"{os.getpid()} {torch.get_num_threads()}"
    with pytest.raises(PatchSAEError, match="jobs=0"), workers(0):
        pass
