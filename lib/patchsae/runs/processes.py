"""The processes that train together: who am I, how many are we.

Started by torchrun, a run finds its place in the environment; started alone, it is the only process.
"""

from __future__ import annotations

import os
from typing import NamedTuple

import torch
from torch import Tensor, distributed

from patchsae.runs.errors import PatchSAEError


class Processes(NamedTuple):
    """This process among those that train together."""

    rank: int = 0
    """Number of this process; 0 alone writes files and shows progress."""
    world: int = 1
    """How many there are."""
    group: distributed.ProcessGroup | None = None
    """What they talk through; None for one process."""
    device: str = "cpu"
    """Where tensors must lie to be sent."""

    @property
    def first(self) -> bool:
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Add up `values` over the processes, in place."""
        if self.group is not None:
            distributed.all_reduce(values, group=self.group)
        return values

    def share(self, value: Tensor) -> Tensor:
        """Overwrite `value` with that of process 0."""
        if self.group is not None:
            distributed.broadcast(value, 0, group=self.group)
        return value

    def agree(self, flag: bool) -> bool:
        """Return the flag of process 0."""
        return bool(self.share(torch.tensor(int(flag), device=self.device)))

    def wait(self) -> None:
        """Return when every process has come here."""
        if self.group is not None:
            distributed.barrier(group=self.group)


def join(device: str | torch.device) -> Processes:
    """Join the processes that torchrun started, or be alone.

    Raises
    ------
    PatchSAEError : the environment speaks of several processes but is incomplete.
    """
    if not distributed.is_initialized():
        if _number("WORLD_SIZE", 1) < 2:
            return Processes()
        backend = "nccl" if torch.device(device).type == "cuda" else "gloo"
        try:
            distributed.init_process_group(backend)
        except (ValueError, RuntimeError) as error:
            raise PatchSAEError(
                f"WORLD_SIZE={os.environ['WORLD_SIZE']} is set but the processes cannot meet "
                f"({str(error).splitlines()[0]}); start them with torchrun, or unset WORLD_SIZE."
            ) from error
    world = distributed.get_world_size()
    group = distributed.group.WORLD if world > 1 else None
    return Processes(distributed.get_rank(), world, group, str(device))


def local_device(device: str) -> str:
    """Return the device of this process: 'cuda' becomes the GPU that torchrun gave it."""
    if device != "cuda" or "LOCAL_RANK" not in os.environ:
        return device
    torch.cuda.set_device(_number("LOCAL_RANK", 0))
    return f"cuda:{_number('LOCAL_RANK', 0)}"


def _number(name: str, default: int) -> int:
    value = os.environ.get(name, str(default))
    if not value.isdigit():
        raise PatchSAEError(f"the environment variable {name}='{value}' is no number; unset it.")
    return int(value)
