"""Run many tasks, several at a time, in processes that share the processor."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager

import torch

from patchsae.runs.errors import PatchSAEError
from patchsae.runs.progress import progress_bar

Run = Callable[[str, Callable, Sequence[tuple]], None]


@contextmanager
def workers(jobs: int, progress: bool = True) -> Iterator[Run]:
    """Give a function `run(title, task, arguments)` that calls `task(*a)` for all, `jobs` at a time.

    Tasks are begun in their order. Each process has its share of torch's threads, shows no progress bars,
    and lives until the block ends, so that what a task loads once is there for the next. With jobs=1
    everything runs here. Processes are spawned: tasks are functions of a module, their arguments can be
    pickled, and a script needs the guard `if __name__ == "__main__":`.

    Raises
    ------
    PatchSAEError : jobs < 1; a process died. What a task raises is raised here, and the rest is not begun.
    """
    if jobs < 1:
        raise PatchSAEError(f"jobs={jobs} must be at least 1.")
    if jobs == 1:
        yield lambda title, task, arguments: _here(title, task, arguments, progress)
        return
    # spawned: a fork would copy torch's threads half
    context = multiprocessing.get_context("spawn")
    threads = max(1, torch.get_num_threads() // jobs)
    pool = ProcessPoolExecutor(jobs, context, initializer=_start, initargs=(threads,))

    def run(title: str, task: Callable, arguments: Sequence[tuple]) -> None:
        waiting = [pool.submit(task, *a) for a in arguments]
        bar = progress_bar(as_completed(waiting), desc=title, total=len(waiting), shown=progress)
        for finished in bar:
            finished.result()

    try:
        yield run
    except BrokenProcessPool as error:
        raise PatchSAEError(
            f"one of jobs={jobs} processes died; ask for fewer, or for 1 if memory is short."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _here(title: str, task: Callable, arguments: Sequence[tuple], progress: bool) -> None:
    for a in progress_bar(arguments, desc=title, shown=progress):
        task(*a)


def _start(threads: int) -> None:
    torch.set_num_threads(threads)
    os.environ["TQDM_DISABLE"] = "1"
    threading.Thread(target=_leave_with_parent, daemon=True).start()


def _leave_with_parent() -> None:
    # a parent that was killed does not close the queue that an idle process waits at
    multiprocessing.parent_process().join()
    os._exit(1)
