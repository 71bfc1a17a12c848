"""Do two runs find the same latents: dictionaries matched row by row, and what matches by chance."""

from __future__ import annotations

from enum import StrEnum

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from patchsae.runs.errors import PatchSAEError
from patchsae.sae.model import SAE


class Against(StrEnum):
    """What a dictionary is matched with: the claim first, then what it has to beat."""

    SEED = "the same training from another seed"
    START = "its own start, before training"
    """High where rows hardly moved: a latent may then be shared with nothing but its initial weights."""
    UNTRAINED = "an untrained dictionary"
    """Random directions of the other seed: what so many rows in so many dimensions match by chance."""
    PERMUTED = "another seed's, its dimensions permuted"
    """The other seed's angles between rows, in directions that have nothing to do with it."""


def cosines(a: Tensor, b: Tensor) -> Tensor:
    """Compute the cosine of every row of a [n, d] with every row of b [m, d]: [n, m].

    Raises
    ------
    PatchSAEError : the widths differ, or a dictionary has no rows.
    """
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or not len(a) or not len(b):
        raise PatchSAEError(
            f"dictionaries must be [n, d] and [m, d]; got {list(a.shape)} and {list(b.shape)}; "
            f"compare SAEs of one backbone and block."
        )
    return F.normalize(a.detach().double(), dim=1) @ F.normalize(b.detach().double(), dim=1).T


def matched_cosines(a: Tensor, b: Tensor) -> np.ndarray:
    """Match rows of a [n, d] with rows of b [m, d], one to one, so that their cosines sum to the most.

    The Hungarian method (facts.md §7). Returns the cosine of each matched row, float64 [min(n, m)], in the
    order of the shorter dictionary's rows (of a's, where both are as long). The matrix [n, m] is held in
    float64.
    """
    found = cosines(a, b).cpu().numpy()
    rows, columns = linear_sum_assignment(found, maximize=True)
    order = np.argsort(columns) if len(b) < len(a) else slice(None)
    return found[rows, columns][order]


def pw_mcc(a: Tensor, b: Tensor) -> float:
    """Return the pairwise mean correlation coefficient: the mean best cosine of a's rows among all of b's.

    2505.20254; facts.md §7. Where both dictionaries are as long, both ways are averaged; where a is a draw
    of its dictionary, b's rows would miss those not drawn. Rows may share their best, so it is at least the
    mean of `matched_cosines`.
    """
    found = cosines(a, b)
    own = found.amax(1).mean()
    return ((own + found.amax(0).mean()) / 2 if len(a) == len(b) else own).item()


def pairs(
    first: SAE, other: SAE | None, seeds: tuple[int, int], most: int = 4096, draw: int = 0
) -> dict[Against, tuple[Tensor, Tensor]]:
    """Return the decoders to be matched: of two seeds, and of the controls.

    Each pair is [min(d_sae, most), d_in] and [d_sae, d_in]: of a larger dictionary some latents are drawn,
    the same for all pairs, because the Hungarian method takes cubic time. Without `other` there are the
    controls START and UNTRAINED alone.

    Parameters
    ----------
    seeds : what both SAEs were trained from, or would have been
    most : latents of `first` that are matched
    draw : seed of the draw and of the permutation
    """
    rng = torch.Generator().manual_seed(draw)
    drawn = torch.randperm(first.d_sae, generator=rng)[:most].sort().values.to(first.W_dec.device)
    a = first.W_dec.detach()[drawn]
    configs = first.config, first.config if other is None else other.config
    start, untrained = (
        SAE(config, seed).W_dec.detach().to(a) for config, seed in zip(configs, seeds, strict=True)
    )
    found = {Against.START: (a, start), Against.UNTRAINED: (a, untrained)}
    if other is not None:
        b = other.W_dec.detach()
        mixed = torch.randperm(other.d_in, generator=rng).to(b.device)
        found |= {Against.SEED: (a, b), Against.PERMUTED: (a, b[:, mixed])}
    return {kind: found[kind] for kind in Against if kind in found}
