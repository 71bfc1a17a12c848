"""One pool of threads for kernels that release the interpreter."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import torch

from patchsae.runs.products import fast_float32


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    # one torch thread in each: OpenMP's own threads would go on spinning beside ours
    return ThreadPoolExecutor(threads, "sparse", initializer=torch.set_num_threads, initargs=(1,))


@fast_float32()
def spread(task: Callable, ranges: Iterable[tuple[int, int]]) -> list:
    """Run task(start, stop) for every range on as many threads as torch uses, results in order."""
    return list(_pool(torch.get_num_threads()).map(lambda r: task(*r), ranges))


def ranges(total: int, size: int) -> list[tuple[int, int]]:
    """Cut 0 … total into ranges of `size`."""
    return [(a, min(a + size, total)) for a in range(0, total, size)]


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # threads do not survive a fork
