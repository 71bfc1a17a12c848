"""A person's own images and autoencoder in the chapters, in place of a scale's."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from patchbook.scales import Sets
from patchsae.clip.backbone import Backbone
from patchsae.images.sets import Dataset
from patchsae.lens import load_sae, open_images
from patchsae.runs.errors import PatchSAEError
from patchsae.runs.stage import Stage
from patchsae.training.trainer import Trained, write_metrics

TEMPLATE = "a photo of a {}."
EVERY = 5  # of each class every fifth image is kept apart


def own_sets(source: str, backbone: Backbone) -> Sets:
    """Open a folder, shards, or a set of another library, as `patchsae.open_images` does, in two parts.

    Every fifth image of each class is for testing and never trained on; the two parts are also the only
    benchmark, of the folder's classes.

    Raises
    ------
    PatchSAEError : no class has five images; as `open_images`.
    """
    images = open_images(source, backbone)
    place = np.empty(len(images), np.int64)
    for label in range(len(images.classnames)):
        of_class = np.flatnonzero(images.labels == label)
        place[of_class] = np.arange(len(of_class))
    apart = place % EVERY == EVERY - 1
    if not apart.any():
        raise PatchSAEError(
            f"no class of '{source}' has {EVERY} images, of which one could be kept for testing; give more."
        )
    train, test = (
        images.subset(np.flatnonzero(part), split) for part, split in ((~apart, "train"), (apart, "test"))
    )
    data = Dataset(images.name, images.name, images.classnames, TEMPLATE, train, test)
    return Sets(train, test, (data,))


def own_sae(source: str, backbone: Backbone, root: Path) -> Trained:
    """Read an autoencoder as `patchsae.load_sae` does, and keep it under `root` by its weights' hash.

    It comes without the rows of a training.

    Raises
    ------
    PatchSAEError : as `load_sae`.
    """
    sae = load_sae(source, backbone).sae
    stage = Stage.open(root, "sae", {"given": sae.fingerprint()}, version=1)

    def make() -> None:
        sae.save(stage.path)
        write_metrics(stage.path, [])
        stage.finish("sae.*", "metrics.csv", source=str(source))

    stage.once(make)
    return Trained(sae, [], stage.path)
