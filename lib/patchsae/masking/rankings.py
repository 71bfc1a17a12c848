"""In which order masks take latents: by what an atlas counted for a class or a data set, or at random."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import xarray as xr

from patchsae.clip.backbone import Backbone
from patchsae.runs.errors import PatchSAEError
from patchsae.sae.model import SAE

CLASS, PREDICTED, DATASET, RANDOM = "class (oracle)", "class (predicted)", "dataset", "random {}"


class Ranking(NamedTuple):
    """Latents in the order in which masks take them."""

    name: str
    order: np.ndarray  # int64 [R, S]: a row per class, or one row for all images
    digest: str


def rankings(atlas: xr.Dataset, random: int = 5, seed: int = 0) -> list[Ranking]:
    """Rank latents by their counts per class, in the data set, and at random (paper §4.1.1).

    The class ranking comes twice: for the image's true class, an oracle, as in the paper, and for the class
    the unmasked model predicts. Ties go to the lower latent. `random` rankings are drawn from `seed`.

    Raises
    ------
    PatchSAEError : a class has no image in the atlas.
    """
    images = atlas.class_images.values
    if (images == 0).any():
        name = str(atlas.klass.values[np.flatnonzero(images == 0)[0]])
        raise PatchSAEError(
            f"class '{name}' (and {(images == 0).sum() - 1} more) has no image in the atlas of "
            f"'{atlas.attrs.get('name')}'; take the atlas over more images."
        )
    count = atlas.class_count.values.astype(np.int64)  # [C, S]
    per_class = np.argsort(-count, axis=1, kind="stable")
    whole = np.argsort(-count.sum(0), kind="stable")[None]
    named = {CLASS: per_class, PREDICTED: per_class, DATASET: whole}
    for number in range(random):
        draw = np.random.default_rng([seed, number])
        named[RANDOM.format(number)] = draw.permutation(count.shape[1])[None]
    # one class ranking of ImageNet is 400 MB: it is hashed as it lies in memory, and once
    digests = {id(order): hashlib.sha256(order).hexdigest() for order in named.values()}
    return [Ranking(name, order, digests[id(order)]) for name, order in named.items()]


def check_atlas(
    atlas: xr.Dataset, sae: SAE, sae_hash: str, backbone: Backbone, classnames: Sequence[str]
) -> None:
    """Refuse an atlas of another SAE, backbone or block, or with other classes."""
    about = f"the atlas of '{atlas.attrs.get('name')}'"
    if (found := atlas.attrs.get("sae")) != sae_hash:
        raise PatchSAEError(f"{about} was made with the SAE {found}, not {sae_hash}; make it again.")
    if atlas.attrs.get("weights") != sae.fingerprint():
        raise PatchSAEError(f"{about} was made with other weights of {sae_hash}; make it again.")
    if (found := atlas.attrs.get("block")) != backbone.block:
        raise PatchSAEError(f"{about} describes block {found}, not {backbone.block}; make it again.")
    if atlas.attrs.get("backbone") != backbone.fingerprint():
        raise PatchSAEError(f"{about} was made with another backbone than {backbone.name}; make it again.")
    theirs, ours = [str(name) for name in atlas.klass.values], list(classnames)
    what = f"{len(theirs)} and {len(ours)} classes"
    if len(theirs) == len(ours):
        what = next((f"'{a}' and '{b}'" for a, b in zip(theirs, ours, strict=True) if a != b), "")
    if what:
        raise PatchSAEError(f"{about} and the images have other class names ({what}); use the same set.")
