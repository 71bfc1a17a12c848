"""Read batches of images, or of anything else indexed like them, in this process or in workers.

This module imports little, because every worker process imports it anew.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from patchsae.images.sets import ImageSet
from patchsae.runs.errors import PatchSAEError

WATCH_SECONDS = 20  # between two looks at workers that send nothing


class Source(Dataset, ABC):
    """What a batch of indices becomes; sent to every worker process."""

    name: str

    @abstractmethod
    def read(self, indices: Sequence[int]) -> Tensor:
        """Return one row per index, on the CPU."""

    def __getitem__(self, indices: Sequence[int]) -> Tensor | str:
        try:
            return self.read(indices)
        except PatchSAEError as error:
            # as a value: an exception would arrive wrapped in the worker's traceback
            return str(error)


class Pixels(Source):
    """Images of a set: uint8 [B, 3, H, W]."""

    def __init__(self, images: ImageSet):
        self.images, self.name = images, images.name

    def read(self, indices: Sequence[int]) -> Tensor:
        return self.images.load(indices).images.cpu()


def read_batches(
    source: Source, batches: Iterable[Sequence[int]], workers: int, ahead: int = 2
) -> Iterator[Tensor]:
    """Yield source.read(indices) for each batch of indices, in their order.

    Parameters
    ----------
    batches : may be endless; it is consumed as far as batches are read ahead
    workers : processes that read; 0 reads here. They are spawned, so a script that asks for some needs
        the guard `if __name__ == "__main__":`
    ahead : batches that all workers together hold ready, at least two each

    Raises
    ------
    PatchSAEError : a batch cannot be read; a worker died, or was stopped for half a minute.
    """
    options: dict[str, Any] = {}
    if workers:
        # spawned: a fork would copy torch's threads, and CUDA's state, half
        options = {
            "multiprocessing_context": "spawn",
            "prefetch_factor": max(2, -(-ahead // workers)),
            "timeout": WATCH_SECONDS,
            "worker_init_fn": partial(_leave_if_orphaned, os.getpid()),
        }
    # a generator of its own: DataLoader draws a seed for workers, else from the caller's global one
    options |= {"num_workers": workers, "generator": torch.Generator()}
    loader = DataLoader(source, batch_size=None, sampler=batches, **options)
    iterator = iter(loader)
    try:
        while True:
            try:
                batch = next(iterator)
            except StopIteration:
                return
            except RuntimeError as error:
                if "timed out" not in str(error):
                    raise
                _check_running(iterator._workers, source.name)  # else it is slow, and asked again
                continue
            if isinstance(batch, str):
                raise PatchSAEError(batch)
            yield batch
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise PatchSAEError(
            f"a process that reads '{source.name}' died ({str(error).splitlines()[0]}); ask for fewer than "
            f"workers={workers}, or for 0 if memory is short or the image set is defined in a notebook."
        ) from error
    finally:
        if workers:
            # a traceback that is kept (as notebooks do) would keep idle workers with it
            iterator._shutdown_workers()


def _check_running(workers: Sequence[BaseProcess], name: str) -> None:
    for worker in workers:
        try:
            state = Path(f"/proc/{worker.pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (OSError, IndexError):  # not Linux, or it has just ended, which torch sees
            continue
        if state in "Tt":
            raise PatchSAEError(
                f"process {worker.pid}, which reads '{name}', was stopped by a signal or a debugger: "
                f"let it go on (kill -CONT {worker.pid}), or run again, which goes on from what is saved."
            )


def _leave_if_orphaned(parent: int, worker: int) -> None:
    # torch's own watch for a dead parent starts after this, and misses one that died before
    if os.getppid() != parent:
        os._exit(1)
