"""Every per-latent statistic of an image set in one streaming pass.

Accumulators merge: the statistics of A ∪ B are merge(A, B), exactly for counts and top-k lists and to
float64 rounding for sums. No array ever has an image, a token and a latent axis beyond one batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import xarray as xr
from scipy.stats import entropy
from torch import Tensor

from .activations import Tokens, token_columns
from .backbone import Backbone
from .errors import PatchSAEError
from .images import ImageSet
from .sae import SAE
from .stage import Stage


@dataclass(frozen=True)
class AtlasConfig:
    """What is counted."""

    tau: float = 0.2
    """Threshold τ of Eq. 4 above which a token counts as active."""
    k: int = 10
    """Reference images kept per latent."""
    tokens: Tokens = Tokens.ALL
    """Which tokens of an image are aggregated."""

    def __post_init__(self):
        if not self.tau >= 0:
            raise PatchSAEError(f"tau={self.tau} must not be negative; the paper uses 0.2.")
        if self.k < 1:
            raise PatchSAEError(f"k={self.k} must be at least 1.")
        object.__setattr__(self, "tokens", Tokens(self.tokens))


class Accumulator:
    """Sums, counts and top-k lists over the images seen so far."""

    def __init__(self, n_latents: int, n_classes: int, config: AtlasConfig):
        self.config = config
        self.images, self.tokens = 0, 0
        self.class_images = np.zeros(n_classes, np.int64)
        self.active_images = np.zeros(n_latents, np.int64)
        self.active_tokens = np.zeros(n_latents, np.int64)
        self.class_count = np.zeros((n_classes, n_latents), np.int64)
        self.class_sum = np.zeros((n_classes, n_latents), np.float64)
        self.top_value = np.zeros((config.k, n_latents), np.float32)
        self.top_index = np.full((config.k, n_latents), -1, np.int64)
        self.top_label = np.full((config.k, n_latents), -1, np.int64)

    def update(self, f: Tensor, labels: Tensor, indices: Tensor) -> None:
        """Add a batch of latents [B, T, S] with labels [B] and image indices [B]."""
        label = labels.numpy()
        mean = f.mean(1).cpu().numpy()  # [B, S] the image-level activation of the released code
        count = (f > self.config.tau).sum(1).cpu().numpy()  # [B, S] that of Eq. 5
        self.images += len(f)
        self.tokens += f.shape[0] * f.shape[1]
        self.class_images += np.bincount(label, minlength=len(self.class_images))
        self.active_images += (mean > 0).sum(0)
        self.active_tokens += (f > 0).sum((0, 1)).cpu().numpy()
        np.add.at(self.class_count, label, count)
        np.add.at(self.class_sum, label, mean)
        wide = np.broadcast_to
        self._keep_best(mean, wide(indices.numpy()[:, None], mean.shape), wide(label[:, None], mean.shape))

    def merge(self, other: Accumulator) -> Accumulator:
        """Add what another accumulator saw; return self."""
        for name in ("images", "tokens", "class_images", "active_images", "active_tokens"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.class_count += other.class_count
        self.class_sum += other.class_sum
        self._keep_best(other.top_value, other.top_index, other.top_label)
        return self

    def _keep_best(self, value: np.ndarray, index: np.ndarray, label: np.ndarray) -> None:
        # an image that leaves a latent silent is no reference for it, and ties go to the lower index
        index = np.where(value > 0, index, -1)
        value = np.concatenate([self.top_value, np.where(value > 0, value, 0)])
        index = np.concatenate([self.top_index, index])
        label = np.concatenate([self.top_label, np.where(index[self.config.k :] >= 0, label, -1)])
        best = np.lexsort((index, -value), axis=0)[: self.config.k]
        self.top_value = np.take_along_axis(value, best, 0)
        self.top_index = np.take_along_axis(index, best, 0)
        self.top_label = np.take_along_axis(label, best, 0)

    def dataset(self, classnames: tuple[str, ...]) -> xr.Dataset:
        """Return the statistics as a labelled dataset (dimensions latent, klass, rank)."""
        mass = self.class_sum.sum(0)
        with np.errstate(invalid="ignore", divide="ignore"):
            mean_activation = mass / self.active_images
        refs = {"latent": np.arange(len(mass)), "klass": list(classnames)}
        refs["rank"] = np.arange(self.config.k)
        latent = {
            "frequency": (self.active_images / self.images, "share of images"),
            "token_frequency": (self.active_tokens / self.tokens, "share of tokens"),
            "mean_activation": (mean_activation, "image mean over active images"),
            "entropy": (label_entropy(self.class_sum), "nat, over all images (Eq. 3)"),
            "entropy_references": (
                reference_entropy(self.top_value, self.top_label),
                "nat, over the reference images (released code)",
            ),
            "label_std": (reference_std(self.top_value, self.top_label), "label number"),
        }
        data = {name: ("latent", value, {"units": unit}) for name, (value, unit) in latent.items()}
        for name, unit in (("value", "image mean"), ("index", "image"), ("label", "class number")):
            data[f"top_{name}"] = (("rank", "latent"), getattr(self, f"top_{name}"), {"units": unit})
        data["class_count"] = (("klass", "latent"), self.class_count, {"units": "tokens above tau"})
        data["class_sum"] = (("klass", "latent"), self.class_sum, {"units": "sum of image means"})
        data["class_images"] = (("klass",), self.class_images, {"units": "images"})
        attrs = {"images": self.images, "tokens": self.tokens, "tau": self.config.tau}
        return xr.Dataset(data, refs, attrs)


def label_entropy(class_sum: np.ndarray) -> np.ndarray:
    """Compute Eq. 3 from summed activations [classes, latents]: nat, NaN for silent latents."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return entropy(class_sum, axis=0)


def reference_entropy(value: np.ndarray, label: np.ndarray) -> np.ndarray:
    """Compute Eq. 3 over the reference images [k, latents] alone (facts.md §4.6)."""
    same = label[:, None] == label[None]  # [k, k, latents]
    mass = (same * value[None]).sum(1)  # the summed activation of each reference's label
    with np.errstate(invalid="ignore", divide="ignore"):
        p = value / value.sum(0)
        result = -(np.where(p > 0, p * np.log(np.where(p > 0, mass / value.sum(0), 1)), 0)).sum(0)
    return np.where(value.sum(0) > 0, result + 0.0, np.nan)


def reference_std(value: np.ndarray, label: np.ndarray) -> np.ndarray:
    """Compute the activation-weighted standard deviation of the references' label numbers.

    It depends on the order of labels, which is the official order of Unicode or WordNet ids.
    """
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
    frequency, mean, spread = (atlas[v].values for v in ("frequency", "mean_activation", "entropy"))
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


@torch.no_grad()
def make_atlas(
    sae: SAE,
    backbone: Backbone,
    images: ImageSet,
    config: AtlasConfig,
    root: str | Path,
    sae_hash: str,
    batch_size: int = 16,
    progress: bool = True,
) -> xr.Dataset:
    """Describe every latent on an image set, or read the description if `root` holds it.

    Parameters
    ----------
    sae_hash : names the SAE in the manifest, so that an atlas is never used with another one
    """
    if len(images) < config.k:
        raise PatchSAEError(
            f"k={config.k} references were asked for, but '{images.name}' has {len(images)} images."
        )
    inputs = {
        "images": images.fingerprint(),
        "backbone": backbone.fingerprint(),
        "sae": sae_hash,
        "config": config,
    }
    stage = Stage.open(root, f"atlas-{images.name}", inputs)
    path = stage.path / "atlas.zarr"
    if not stage.done:
        columns = torch.from_numpy(token_columns(backbone, config.tokens)).to(backbone.device)
        sums = Accumulator(sae.d_sae, len(images.classnames), config)
        name = f"atlas of {images.name}" if progress else None
        for batch in images.batches(batch_size, progress=name):
            x = backbone.residual(backbone.normalize(batch.images))[:, columns]
            sums.update(sae.encode(x.float()), batch.labels, batch.indices)
        # format 2, because format 3 has no settled way to store class names
        sums.dataset(images.classnames).to_zarr(path, mode="w", consolidated=False, zarr_format=2)
        stage.finish(images=sums.images, tokens=sums.tokens)
    return xr.open_zarr(path, consolidated=False).load()
