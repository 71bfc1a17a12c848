"""Steps of one process of several: `torchrun --nproc-per-node 2 rank_steps.py D_IN D_SAE TOKENS [DEVICE]`.

On "cuda" processes talk through NCCL, also one alone. Process 0 prints tokens per second of all
processes together, median over the steps.
"""

from __future__ import annotations

import sys
import time
from statistics import median

import torch
from torch import distributed

from patchsae.runs.processes import join, local_device
from patchsae.sae.model import SAE, SAEConfig
from patchsae.sae.step import Stepper

STEPS, DISCARDED = 8, 3


def main(d_in: int, d_sae: int, tokens: int, device: str = "cpu") -> None:
    """Take steps on this process's share of a batch of random tokens."""
    device = local_device(device)
    if device != "cpu":
        distributed.init_process_group("nccl")
    processes = join(device)
    group = distributed.group.WORLD if distributed.is_initialized() else None
    torch.set_num_threads(max(1, torch.get_num_threads() // processes.world))
    sae = SAE(SAEConfig(d_in, d_sae / d_in, ghost=False), seed=0).to(device)
    sae.b_enc.data -= 2.3  # of unit rows and tokens of variance 1: one latent in a hundred fires
    stepper = Stepper(sae, group=group)
    x = torch.randn(tokens, d_in, generator=torch.Generator().manual_seed(0))[
        processes.rank :: processes.world
    ]
    x, seconds = x.to(device), []
    for _ in range(STEPS):
        together(device, group)
        started = time.perf_counter()
        stepper.step(x, 1e-6)
        together(device, group)
        seconds.append(time.perf_counter() - started)
    if processes.first:
        print(tokens / median(seconds[DISCARDED:]))
    if group is not None:
        distributed.destroy_process_group()


def together(device: str, group: distributed.ProcessGroup | None) -> None:
    """Wait for the other processes, and for the device."""
    if group is not None:
        distributed.barrier(group=group)
    if device != "cpu":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main(*(int(argument) for argument in sys.argv[1:4]), *sys.argv[4:5])
