"""From a latent to where it fires, scored against the object masks."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def patch_cover(masks: Tensor, grid: tuple[int, int]) -> Tensor:
    """Compute which share of each patch is covered: masks [B, H, W] bool to [B, rows · columns]."""
    return F.adaptive_avg_pool2d(masks.float()[:, None], grid).flatten(1)


class Mass(NamedTuple):
    """Where latents put their activation, summed over images: float64 [S] each."""

    inside: Tensor  # inside the objects
    expected: Tensor  # inside the objects if each image's activation were spread evenly over it
    total: Tensor


def mass_inside(f: Tensor, cover: Tensor) -> Mass:
    """Sum each latent's activation inside the objects, and what an even spread would put there.

    Parameters
    ----------
    f : [B, P, S] latents of the patches
    cover : [B, P] share of each patch inside an object
    """
    per_image = f.sum(1, dtype=torch.float64)  # [B, S]
    inside = torch.einsum("bps,bp->s", f, cover.to(f.dtype)).double()
    expected = cover.double().mean(1).to(f.device) @ per_image
    return Mass(inside, expected, per_image.sum(0))


def upsample(patch_map: Tensor, grid: tuple[int, int], size: int, mode: str = "nearest") -> np.ndarray:
    """Enlarge a patch map [P] to the image: float [size, size], 'nearest' or 'bilinear'."""
    table = patch_map.float().view(1, 1, *grid)
    options = {} if mode == "nearest" else {"align_corners": False}
    return F.interpolate(table, size=(size, size), mode=mode, **options)[0, 0].cpu().numpy()
