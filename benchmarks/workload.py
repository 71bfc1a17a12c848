"""Synthetic tokens and weights of known sparsity, and the problems that are measured on them.

Tokens are Gaussian about a common mean with a spectrum that falls like 1/rank, much as in the residual
stream of a transformer: a few directions carry most of the variance, the mean is as long as the spread. A
latent's pre-activation is then Gaussian too, so the bias that makes it fire with a wanted probability is an
exact quantile and needs no sample, however rare the latent.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

RARE, COMMON = 1e-6, 0.9  # bounds of a latent's firing probability
SILENT = 1e-12  # that of a dead latent: beyond any batch
SPREAD = 1.5  # of log firing probabilities; trained dictionaries span several decades


@dataclass(frozen=True)
class Problem:
    """Size and sparsity of one training problem."""

    d_sae: int
    """Latents."""
    l0: float
    """Mean number of active latents per token."""
    d_in: int = 768
    """Width of a token."""
    tokens: int = 2048
    """Tokens per step."""
    dead_share: float = 0.0
    """Share of the latents that never fire."""
    batches: int = 4
    """Different batches; steps go round them."""
    seed: int = 0


@dataclass(frozen=True)
class Plan:
    """Which problems are measured, and how often: sizes, then L0s, then rounds."""

    narrow: Problem
    wide: Problem
    speed_l0: tuple[int, ...]
    density_l0: tuple[int, ...]
    ghost_l0: int
    memory_l0: int
    narrow_rounds: int
    wide_rounds: int
    density_rounds: int


FULL = Plan(
    narrow=Problem(12_288, 0),
    wide=Problem(49_152, 0),
    speed_l0=(20, 50, 150, 500),
    density_l0=(20, 50, 150, 500, 2000, 6000),
    ghost_l0=50,
    memory_l0=150,
    narrow_rounds=7,
    wide_rounds=4,
    density_rounds=7,
)
QUICK = Plan(
    narrow=Problem(256, 0, d_in=32, tokens=256, batches=2),
    wide=Problem(512, 0, d_in=32, tokens=256, batches=2),
    speed_l0=(8,),
    density_l0=(8, 100),
    ghost_l0=8,
    memory_l0=8,
    narrow_rounds=2,
    wide_rounds=1,
    density_rounds=2,
)


class Weights(NamedTuple):
    """Where every competitor starts."""

    rows: Tensor  # [d_sae, d_in] unit rows: the decoder, and the encoder with one row per latent
    b_enc: Tensor  # [d_sae]
    b_dec: Tensor  # [d_in]


class Workload(NamedTuple):
    """Everything one measurement feeds to every competitor."""

    weights: Weights
    batches: Tensor  # [batches, tokens, d_in]
    dead: Tensor  # bool [d_sae]


def make_workload(problem: Problem) -> Workload:
    """Draw the weights and tokens of a problem: the same for the same problem."""
    draw = torch.Generator().manual_seed(problem.seed)
    basis, mean, deviation = _distribution(problem.d_in, draw)
    rows = F.normalize(torch.randn(problem.d_sae, problem.d_in, generator=draw), dim=-1)
    order = torch.randperm(problem.d_sae, generator=draw)
    dead = torch.zeros(problem.d_sae, dtype=torch.bool)
    dead[order[: round(problem.dead_share * problem.d_sae)]] = True
    probability = torch.full((problem.d_sae,), SILENT, dtype=torch.float64)
    probability[~dead] = firing_probabilities(int((~dead).sum()), problem.l0, draw)
    scale = ((rows @ basis) * deviation).norm(dim=-1).double()  # of a pre-activation without bias
    b_enc = (torch.special.ndtri(probability) * scale).float()
    noise = torch.randn(problem.batches, problem.tokens, problem.d_in, generator=draw)
    batches = (noise * deviation) @ basis.T + mean
    return Workload(Weights(rows, b_enc, mean), batches, dead)


def firing_probabilities(latents: int, l0: float, draw: torch.Generator) -> Tensor:
    """Draw heavy-tailed probabilities that sum to `l0`: log-normal, clipped; float64 [latents]."""
    shape = (SPREAD * torch.randn(latents, generator=draw, dtype=torch.float64)).exp()
    low, high = 0.0, latents * COMMON / shape.min().item()
    for _ in range(200):  # clipping has no inverse in closed form
        middle = (low + high) / 2
        low, high = (middle, high) if _clipped(shape, middle).sum() < l0 else (low, middle)
    return _clipped(shape, high)


def save_workload(path: Path, workload: Workload) -> None:
    """Write a workload for another process."""
    tensors = {**workload.weights._asdict(), "batches": workload.batches, "dead": workload.dead}
    save_file(tensors, path)


def load_workload(path: Path) -> Workload:
    """Read a workload into memory of this process."""
    # clones, or the file's own pages would count as resident memory for as long as they are mapped
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    batches, dead = tensors.pop("batches"), tensors.pop("dead")
    return Workload(Weights(**tensors), batches, dead)


def _distribution(d_in: int, draw: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Return an orthonormal basis [d_in, d_in], the mean [d_in], the deviation along each axis [d_in]."""
    basis, _ = torch.linalg.qr(torch.randn(d_in, d_in, generator=draw))
    variance = 1 / torch.arange(1, d_in + 1)
    deviation = (variance / variance.sum() * d_in).sqrt()
    mean = F.normalize(torch.randn(d_in, generator=draw), dim=0) * d_in**0.5
    return basis, mean, deviation


def _clipped(shape: Tensor, factor: float) -> Tensor:
    return (shape * factor).clamp(RARE, COMMON)
