"""What the explorer shows, as plain arrays: the live widget and the page only draw these."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from patchsae.clip.backbone import Backbone
from patchsae.images.sets import ImageSet
from patchsae.latents.maps import fired
from patchsae.runs.errors import PatchSAEError
from patchsae.sae.model import SAE
from patchsae.training.activations import Tokens, token_columns

STATISTICS = ("image_frequency", "image_frequency_tau", "mean_activation", "entropy", "label_std")
BATCH = 16  # images encoded at a time


@dataclass(frozen=True)
class ExplorerConfig:
    """What is listed and kept."""

    top: int = 5
    """Latents that a model's image mean, and its clicked patch, each put on the lists (the demo: 5)."""
    frequent: float = 0.5
    """Share of images with a token above τ beyond which a latent is left out of the lists."""
    references: int = 4
    """Reference images shown per latent and data set."""
    thumbnail: int = 96
    """Side of a reference image in pixels."""
    answered: int = 16
    """Strongest latents of a picture without each of which every model's answer is kept."""
    judged: int = 500
    """Most pictures that names are judged on, where no vocabulary brings its own."""

    def __post_init__(self):
        for name in ("top", "references", "thumbnail", "answered", "judged"):
            if getattr(self, name) < 1:
                raise PatchSAEError(f"{name}={getattr(self, name)} must be at least 1.")
        if not 0 <= self.frequent <= 1:
            raise PatchSAEError(f"frequent={self.frequent} must lie in 0..1; 1 leaves no latent out.")


class Activations(NamedTuple):
    """One image under one model: every latent that is active on it, none left out."""

    latent: np.ndarray  # [R] int64, ascending
    mean: np.ndarray  # [R] float32, over CLS and patches, as an atlas has it
    start: np.ndarray  # [R + 1] int64, a latent's first entry
    patch: np.ndarray  # [entries] int64, row by row from the top left, ascending inside a latent
    value: np.ndarray  # [entries] float32, positive


@torch.no_grad()
def activations(sae: SAE, backbone: Backbone, images: Tensor) -> list[Activations]:
    """Encode images uint8 [B, 3, H, W] by one model, as `activations_of` its tokens."""
    return activations_of(sae, backbone, backbone.residual(backbone.normalize(images)))


@torch.no_grad()
def activations_of(sae: SAE, backbone: Backbone, x: Tensor) -> list[Activations]:
    """Encode the tokens [B, T, d] that a model has of B images.

    Prompt tokens count for nothing (facts.md §1.4). A latent active on CLS alone has a mean and no entries.
    """
    columns = token_columns(backbone, Tokens.ALL)
    kinds = backbone.token_kind[columns]
    number = np.where(kinds == "patch", np.cumsum(kinds == "patch") - 1, -1)
    found = fired(sae, x[:, torch.from_numpy(columns).to(backbone.device)].float())
    counts = np.diff(found.start)
    if len(counts):
        mean = np.add.reduceat(found.value.astype(np.float64), found.start[:-1]) / len(columns)
    else:
        mean = np.zeros(0)
    row, patch = np.repeat(np.arange(len(counts)), counts), number[found.patch]
    shown = []
    for image in range(len(x)):
        rows = np.flatnonzero(found.image == image)
        kept = (found.image[row] == image) & (patch >= 0)
        entries = np.bincount(np.searchsorted(rows, row[kept]), minlength=len(rows))
        shown.append(
            Activations(
                found.latent[rows], mean[rows].astype(np.float32), np.append(0, entries.cumsum()),
                patch[kept], found.value[kept],
            )
        )  # fmt: skip
    return shown


def image_values(found: Activations, latents: int) -> np.ndarray:
    """Return image-level activations, float32 [latents]."""
    values = np.zeros(latents, np.float32)
    values[found.latent] = found.mean
    return values


def patch_values(found: Activations, patch: int, latents: int) -> np.ndarray:
    """Return the activations of one patch, float32 [latents]."""
    values, here = np.zeros(latents, np.float32), found.patch == patch
    values[np.repeat(found.latent, np.diff(found.start))[here]] = found.value[here]
    return values


def patch_map(found: Activations, latent: int, patches: int) -> np.ndarray:
    """Return where one latent fires, float32 [patches]."""
    values, row = np.zeros(patches, np.float32), np.searchsorted(found.latent, latent)
    if row < len(found.latent) and found.latent[row] == latent:
        entries = slice(found.start[row], found.start[row + 1])
        values[found.patch[entries]] = found.value[entries]
    return values


class Groups(NamedTuple):
    """Latents of the three lists, each with the value it is sorted by, the largest first."""

    common: list[tuple[int, float]]
    only_clip: list[tuple[int, float]]
    only_adapted: list[tuple[int, float]]


def group_latents(
    clip: Activations,
    adapted: Activations | None,
    left_out: np.ndarray,
    patch: int | None = None,
    top: int = ExplorerConfig.top,
) -> Groups:
    """List the latents that both models, or one alone, put on top for an image and one of its patches.

    A model puts on top its `top` largest image-level activations and, if a patch is chosen, its `top`
    largest on that patch; equal values in the order of latent numbers, silent latents never. `left_out` [S]
    says which latents count as firing on nearly everything. Without an adapted model, all that CLIP puts on
    top is its alone. Every list is sorted by a latent's largest activation in the list's models: image
    level and, if a patch is chosen, on the patch. (The authors' demo sorts the exclusive lists by latent
    number; facts.md §5.)
    """
    levels, chosen = [], []
    for found in (clip,) if adapted is None else (clip, adapted):
        values = [image_values(found, len(left_out))]
        if patch is not None:
            values.append(patch_values(found, patch, len(left_out)))
        levels.append(np.max(values, axis=0))
        chosen.append({latent for value in values for latent in strongest(value, left_out, top)})

    def ordered(latents: set[int], by: np.ndarray) -> list[tuple[int, float]]:
        return [(s, float(by[s])) for s in sorted(latents, key=lambda s: (-by[s], s))]

    if adapted is None:
        return Groups([], ordered(chosen[0], levels[0]), [])
    return Groups(
        ordered(chosen[0] & chosen[1], np.maximum(*levels)),
        ordered(chosen[0] - chosen[1], levels[0]),
        ordered(chosen[1] - chosen[0], levels[1]),
    )


def strongest(values: np.ndarray, left_out: np.ndarray, top: int) -> list[int]:
    """Return the latents of the `top` largest positive values [S], those left out aside."""
    order = np.argsort(-np.where(left_out, 0, values), kind="stable")[:top]
    return [int(s) for s in order if values[s] > 0 and not left_out[s]]


def fires_on_nearly_everything(atlas: xr.Dataset | None, frequent: float, latents: int) -> np.ndarray:
    """Tell which latents are left out of the lists: bool [S], active above τ on too many images.

    None is without an atlas, nor where more than half of those that fire would be: of few pictures, or from
    an autoencoder that has hardly learned, lists would be empty. (The authors' demo leaves out what has a
    mean activation above 0.1.)
    """
    if atlas is None:
        return np.zeros(latents, bool)
    often = atlas.image_frequency_tau.values > frequent
    return often & (2 * often.sum() <= (atlas.image_frequency_tau.values > 0).sum())


class References(NamedTuple):
    """The images of a set that activate each latent most."""

    index: np.ndarray  # [k, S] image of the set, -1 where there is none
    value: np.ndarray  # [k, S] float32 image-level activation
    label: np.ndarray  # [k, S] class number
    images: np.ndarray  # images that are a reference of some latent, ascending


def references(atlas: xr.Dataset, k: int) -> References:
    """Take each latent's first k reference images from an atlas (fewer, if it has fewer)."""
    index = atlas.top_index.values[:k]
    index = np.where(atlas.top_value.values[:k] > 0, index, -1)
    images = np.unique(index[index >= 0])
    return References(index, atlas.top_value.values[:k], atlas.top_label.values[:k], images)


def misfit(atlas: xr.Dataset, sae: SAE, sae_hash: str, backbone: Backbone, images: ImageSet | None) -> str:
    """Say in one sentence why an atlas does not describe this SAE on this model, or nothing."""
    name, of = atlas.attrs.get("name", "?"), atlas.attrs.get("sae", "?")
    if of != sae_hash:
        return (
            f"The atlas of '{name}' describes {of}, not {sae_hash}, and is left out: make it with this SAE."
        )
    if atlas.attrs.get("weights") != sae.fingerprint():
        return f"The atlas of '{name}' describes other weights of {of} and is left out: make it again."
    if atlas.attrs.get("backbone") != backbone.fingerprint():
        return f"The atlas of '{name}' was made with another model and is left out: use {backbone.name}."
    if images is not None and atlas.attrs.get("image_set") != images.fingerprint():
        count = f"{atlas.attrs.get('images')} images that are not the {len(images)} given"
        return f"The atlas of '{name}' describes {count}, and is left out: give the images it was made on."
    return ""


def statistics(atlas: xr.Dataset) -> Mapping[str, np.ndarray]:
    """Return what is shown of every latent, float32 [S] each; NaN where a silent latent has none."""
    return {name: atlas[name].values.astype(np.float32) for name in STATISTICS}


def atlas_digest(atlas: xr.Dataset) -> str:
    """Hash what the explorer shows of an atlas."""
    content = hashlib.sha256(str(sorted(atlas.attrs.items())).encode())
    for name in (*STATISTICS, "top_index", "top_value", "top_label"):
        content.update(np.ascontiguousarray(atlas[name].values).tobytes())
    return content.hexdigest()
