"""From a latent to where it fires: maps on the patch grid, soft masks over the image, renderings."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from patchsae.clip.backbone import Backbone
from patchsae.runs.errors import PatchSAEError
from patchsae.sae.cpu import Lists
from patchsae.sae.model import SAE
from patchsae.sae.step import latent_lists


class Upsampling(StrEnum):
    """How a patch map is enlarged to the image."""

    NEAREST = "nearest"  # every pixel has its patch's value: the paper's masks
    BILINEAR = "bilinear"


class Fired(NamedTuple):
    """Where latents are active on B images: one row for every (image, latent) that has an active patch."""

    image: np.ndarray  # [R] int64, 0 … B-1
    latent: np.ndarray  # [R] int64; rows ascend by (latent, image)
    start: np.ndarray  # [R + 1] int64, a row's first entry
    patch: np.ndarray  # [entries] int64, ascending inside a row
    value: np.ndarray  # [entries] float32, positive


def fired(sae: SAE, x: Tensor) -> Fired:
    """List where every latent is active on patch tokens x [B, P, d]; no [B, P, d_sae] array is made."""
    lists: Lists = latent_lists(sae, x.flatten(0, 1).float())
    token, patches = lists.index.astype(np.int64), x.shape[1]
    latent, image = np.repeat(np.arange(sae.d_sae), np.diff(lists.start)), token // patches
    key = latent * len(x) + image
    first = np.flatnonzero(np.diff(key, prepend=-1))
    return Fired(image[first], latent[first], np.append(first, len(key)), token % patches, lists.value)


def image_means(found: Fired, images: int, patches: int, latents: int) -> np.ndarray:
    """Average activations over the patches of each image: float32 [images, latents]."""
    means = np.zeros((images, latents), np.float32)
    if len(found.image):
        means[found.image, found.latent] = np.add.reduceat(found.value, found.start[:-1]) / patches
    return means


def latent_maps(sae: SAE, x: Tensor, latents: Sequence[int]) -> Tensor:
    """Return the activation maps of chosen latents on patch tokens x [B, P, d]: float32 [B, S', P].

    Raises
    ------
    PatchSAEError : a latent that the SAE does not have.
    """
    wanted = np.asarray(latents, dtype=np.int64)
    if wanted.size and not 0 <= wanted.min() <= wanted.max() < sae.d_sae:
        raise PatchSAEError(f"latents must lie in 0..{sae.d_sae - 1}; got {wanted.min()}..{wanted.max()}.")
    found = fired(sae, x)
    maps = np.zeros((len(x), len(wanted), x.shape[1]), np.float32)
    for place, latent in enumerate(wanted):
        first, last = np.searchsorted(found.latent, (latent, latent + 1))
        entries = slice(found.start[first], found.start[last])
        image = np.repeat(found.image[first:last], np.diff(found.start[first : last + 1]))
        maps[image, place, found.patch[entries]] = found.value[entries]
    return torch.from_numpy(maps)


def grid_of(n: int, grid: tuple[int, int]) -> tuple[int, int]:
    """Return the grid if it has n patches.

    Raises
    ------
    PatchSAEError : it has another number, as when CLS or prompt tokens were left in.
    """
    if grid[0] * grid[1] != n:
        raise PatchSAEError(
            f"a map of {n} values does not fit {grid[0]}×{grid[1]} patches; leave out all other tokens."
        )
    return grid


def patch_of(side: int, cells: int) -> np.ndarray:
    """Return the row (or column) of patches that each of `side` pixels belongs to: int64 [side]."""
    return np.arange(side) * cells // side


def covered_pixels(masks: Tensor, grid: tuple[int, int]) -> Tensor:
    """Count the pixels of each patch inside a mask: masks [B, H, W] bool to float32 [B, P], exact."""
    rows, columns = (
        F.one_hot(torch.from_numpy(patch_of(side, cells)), cells).float().to(masks.device)
        for side, cells in zip(masks.shape[-2:], grid, strict=True)
    )
    return torch.einsum("bhw,hr,wc->brc", masks.float(), rows, columns).flatten(1)


def patch_cover(masks: Tensor, grid: tuple[int, int]) -> Tensor:
    """Compute which share of each patch is covered: masks [B, H, W] bool to [B, rows · columns]."""
    return covered_pixels(masks, grid) / covered_pixels(torch.ones_like(masks[:1]), grid)


class Mass(NamedTuple):
    """Where latents put their activation, summed over images: float64 [S] each."""

    inside: np.ndarray  # inside the objects
    expected: np.ndarray  # inside the objects if each image's activation were spread evenly over it
    total: np.ndarray


def mass_inside(found: Fired, cover: Tensor, latents: int) -> Mass:
    """Sum each latent's activation inside the objects, and what an even spread would put there.

    Parameters
    ----------
    found : where S = `latents` latents fire on B images
    cover : [B, P] share of each patch inside an object
    """
    share, value = cover.cpu().double().numpy(), found.value.astype(np.float64)
    row = np.repeat(np.arange(len(found.image)), np.diff(found.start))  # [entries]
    image, latent = found.image[row], found.latent[row]
    weights = share[image, found.patch] * value, share.mean(1)[image] * value, value
    return Mass(*(np.bincount(latent, weight, latents) for weight in weights))


def upsample(
    patch_map: Tensor, grid: tuple[int, int], size: int, mode: Upsampling = Upsampling.NEAREST
) -> np.ndarray:
    """Enlarge a patch map [P] to the image: float32 [size, size]."""
    rows, columns = grid_of(len(patch_map), grid)
    table = patch_map.float().cpu().view(1, 1, rows, columns)
    if mode == Upsampling.NEAREST:
        return table[0, 0].numpy()[patch_of(size, rows)][:, patch_of(size, columns)]
    return F.interpolate(table, (size, size), mode=Upsampling(mode), align_corners=False)[0, 0].numpy()


def soft_mask(
    patch_map: Tensor,
    grid: tuple[int, int],
    size: int,
    mode: Upsampling = Upsampling.NEAREST,
    peak: float | None = None,
) -> np.ndarray:
    """Turn a patch map [P] into a mask over the image, float32 [size, size] in 0..1.

    Activations are divided by `peak`, by default the map's largest. One peak for several images of a latent
    keeps their strengths comparable. A silent map is 0 everywhere.
    """
    peak = float(patch_map.max()) if peak is None else peak
    return (upsample(patch_map, grid, size, mode) / max(peak, 1e-12)).clip(0, 1)


def render(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Multiply an image uint8 [H, W, 3] by a mask [H, W] in 0..1 (paper §3.2): uint8 [H, W, 3]."""
    return (image * mask.clip(0, 1)[..., None]).round().astype(np.uint8)


@torch.no_grad()
def masked_images(
    sae: SAE,
    backbone: Backbone,
    images: Tensor,
    latent: int,
    mode: Upsampling = Upsampling.NEAREST,
    common_peak: bool = True,
) -> list[np.ndarray]:
    """Render images uint8 [B, 3, H, W] with one latent's masks, as uint8 [H, W, 3].

    A common peak keeps strengths comparable between the images; without it each is as bright as it can be.
    """
    maps = latent_maps(sae, patch_tokens(backbone, images), [latent])[:, 0]
    pixels, peak = images.permute(0, 2, 3, 1).cpu().numpy(), float(maps.max()) if common_peak else None
    return [
        render(image, soft_mask(patch_map, backbone.grid, image.shape[0], mode, peak))
        for image, patch_map in zip(pixels, maps, strict=True)
    ]


@torch.no_grad()
def patch_tokens(backbone: Backbone, images: Tensor) -> Tensor:
    """Return the patch tokens [B, P, d] of images uint8 [B, 3, H, W] at the backbone's block."""
    patches = torch.from_numpy(np.flatnonzero(backbone.token_kind == "patch")).to(backbone.device)
    return backbone.residual(backbone.normalize(images))[:, patches].float()
