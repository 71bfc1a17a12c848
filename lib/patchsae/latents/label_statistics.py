"""What a latent's images say about it: label entropy and spread, purity, regions, co-activation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import xarray as xr
from scipy.special import entr

from patchsae.runs.errors import PatchSAEError


def label_entropy(class_sum: np.ndarray) -> np.ndarray:
    """Compute Eq. 3 from summed activations [classes, latents]: nat, NaN for silent latents."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return entr(class_sum / class_sum.sum(0)).sum(0)


def label_std(class_sum: np.ndarray) -> np.ndarray:
    """Compute the activation-weighted standard deviation of label numbers [classes, latents].

    It depends on the order of labels, which is the official order of Unicode or WordNet ids.
    """
    number = np.arange(len(class_sum))[:, None]
    with np.errstate(invalid="ignore", divide="ignore"):
        p = class_sum / class_sum.sum(0)
        centre = (p * number).sum(0)
        return np.sqrt((p * (number - centre) ** 2).sum(0))


def reference_entropy(value: np.ndarray, label: np.ndarray) -> np.ndarray:
    """Compute Eq. 3 over the reference images [k, latents] alone (facts.md §4.6)."""
    same = label[:, None] == label[None]  # [k, k, latents]
    mass = (same * value[None]).sum(1)  # the summed activation of each reference's label
    with np.errstate(invalid="ignore", divide="ignore"):
        p = value / value.sum(0)
        result = -(np.where(p > 0, p * np.log(np.where(p > 0, mass / value.sum(0), 1)), 0)).sum(0)
    return np.where(value.sum(0) > 0, result + 0.0, np.nan)


def reference_std(value: np.ndarray, label: np.ndarray) -> np.ndarray:
    """Compute `label_std` over the reference images [k, latents] alone."""
    with np.errstate(invalid="ignore", divide="ignore"):
        p = value / value.sum(0)
        centre = (p * label).sum(0)
        return np.sqrt((p * (label - centre) ** 2).sum(0))


def pick_regions(atlas: xr.Dataset) -> dict[str, int]:
    """Pick one latent from each of four regions of the Fig. 3 scatter, by rule.

    Among latents with a full set of references, the lowest and highest thirds of frequency and of mean
    activation are 'rare', 'frequent', 'weak' and 'strong': (a) rare and weak with the highest label
    entropy, (b) rare and strong with the lowest, (c) frequent and strong with the highest, (d) frequent
    and strong with the lowest. Ties go to the lower number; a region without latents is left out.
    """
    full = (atlas.top_index.values >= 0).all(0)
    frequency, mean, spread = (atlas[v].values for v in ("image_frequency", "mean_activation", "entropy"))
    if not full.any():
        raise PatchSAEError(
            "no latent has a full set of reference images; take the atlas over more images."
        )
    (rare, often), (weak, strong) = (np.quantile(v[full], (1 / 3, 2 / 3)) for v in (frequency, mean))
    regions = {
        "a": ((frequency <= rare) & (mean <= weak), spread),
        "b": ((frequency <= rare) & (mean >= strong), -spread),
        "c": ((frequency >= often) & (mean >= strong), spread),
        "d": ((frequency >= often) & (mean >= strong), -spread),
    }
    return {
        name: int(np.where(full & where, score, -np.inf).argmax())
        for name, (where, score) in regions.items()
        if (full & where).any()
    }


class Purity(NamedTuple):
    """How alike the labels of a latent's reference images are."""

    observed: np.ndarray  # [latents] share of the commonest label among the references
    null: np.ndarray  # [draws] mean over latents after permuting labels between images


def purity(top_label: np.ndarray, draws: int = 200, seed: int = 0) -> Purity:
    """Compare reference labels [k, latents] with the same labels dealt out at random.

    Latents with fewer than k references must be left out by the caller.
    """

    def modal(labels: np.ndarray) -> np.ndarray:
        return (labels[:, None] == labels[None]).sum(0).max(0) / len(labels)

    rng = np.random.default_rng(seed)
    null = [modal(rng.permuted(top_label.ravel()).reshape(top_label.shape)).mean() for _ in range(draws)]
    return Purity(modal(top_label), np.array(null))


def co_activation(atlas: xr.Dataset, latents: np.ndarray) -> np.ndarray:
    """Count the images on which two latents are both among the image's top ones.

    Returns int64 [n, n] for the n given latents, images per latent on the diagonal.
    """
    top = atlas.image_latent.values  # [images, m]
    held = np.stack([(top == latent).any(1) for latent in latents], 1).astype(np.int64)
    return held.T @ held


def pick_shared(described: xr.Dataset, others: Sequence[xr.Dataset]) -> list[int]:
    """Pick the latents of Fig. 10: lowest and highest label entropy among those at home everywhere.

    A latent is at home in a data set if it has a full set of references there. `described` gives the
    entropy; `others` are atlases of the same SAE. One latent if there is only one, none if none is.
    """
    home = np.logical_and.reduce([(atlas.top_index.values >= 0).all(0) for atlas in others])
    latents = np.flatnonzero(home & np.isfinite(described.entropy.values))
    spread = described.entropy.values[latents]
    ends = (spread.argmin(), spread.argmax()) if len(latents) else ()
    return sorted({int(latents[end]) for end in ends}, key=lambda latent: described.entropy.values[latent])


def pick_typical(atlases: Sequence[xr.Dataset], least: float = 0.1) -> list[int]:
    """Pick one latent per data set (Fig. 14): the one that favours it most.

    That is the latent with the largest share of its data set's tokens above τ relative to its mean share
    over all of them, among the latents active on at least `least` of the images; each is picked once, the
    first data set first. A data set without such a latent gets the most frequent one that is left.
    """
    share = np.stack([atlas.dataset_count.values / atlas.attrs["tokens"] for atlas in atlases])
    with np.errstate(invalid="ignore", divide="ignore"):
        lift = np.where(share.sum(0) > 0, share / share.mean(0), 0.0)
    picked: list[int] = []
    for atlas, row in zip(atlases, lift, strict=True):
        frequency = atlas.image_frequency.values.copy()
        frequency[picked] = -1
        score = np.where(frequency >= least, row, -np.inf)
        picked.append(int(score.argmax() if np.isfinite(score).any() else frequency.argmax()))
    return picked
