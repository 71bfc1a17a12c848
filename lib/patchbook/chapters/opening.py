"""What every chapter opens with: model, images, autoencoder, and the parameters they follow from."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import xarray as xr
from torch import Tensor

from patchbook.kept import keep
from patchbook.own import own_sae, own_sets
from patchbook.scales import Scale, Sets
from patchbook.scales import scale as open_scale
from patchsae.clip.backbone import Backbone, zero_shot_weights
from patchsae.clip.remembered import Remembered
from patchsae.clip.token_store import TokenStore
from patchsae.images.sets import Dataset, ImageSet, Subset
from patchsae.latents.atlas import AtlasConfig, make_atlas
from patchsae.runs.errors import PatchSAEError
from patchsae.runs.stage import project_root
from patchsae.sae.model import SAE
from patchsae.training.trainer import Trained

T = TypeVar("T")
MEMORY = Remembered(450_000_000)
"""What a chapter's models saw last, 4,500 images of the small CLIP, if it asks of the same ones again."""
STORE = 1_200_000_000
"""Bytes of tokens that chapters leave each other on disk: of 8,000 images and more, of the small CLIP."""


class Changes(NamedTuple):
    """What a chapter's parameters change in a scale's recipe; None leaves the scale's."""

    sae: dict[str, object]
    train: dict[str, object]


@dataclass(frozen=True)
class Run:
    """One run of a chapter."""

    setup: Scale
    backbone: Backbone
    sets: Sets
    root: Path
    """Folder of results."""
    changes: Changes
    seed: int
    workers: int = 0
    """Processes that decode images."""
    given: str = ""
    """Folder, file or hub name of an autoencoder that is taken as it is."""

    @cached_property
    def trained(self) -> Trained:
        """Return the autoencoder of this run: given, shipped, found in results, or trained now."""
        if self.given:
            return own_sae(self.given, self.backbone, self.root)
        return self.setup.trained_sae(
            self.sets.train, self.backbone, self.root, self.changes.sae, self.changes.train
        )

    @property
    def sae(self) -> SAE:
        """Return the autoencoder itself."""
        return self.trained.sae

    @property
    def sae_hash(self) -> str:
        """Return the name of its folder, which names it in every result."""
        return self.trained.folder.name

    def few(self, images: ImageSet, n: int) -> ImageSet:
        """Draw n images, or take all for n = 0."""
        return images.sample(n, self.seed) if n else images

    @cached_property
    def store(self) -> TokenStore:
        """Return the tokens of training images that another chapter asked for."""
        return TokenStore(self.root / "tokens.sqlite", STORE)

    def atlas(
        self, images: ImageSet, config: AtlasConfig, backbone: Backbone | None = None,
        trained: Trained | None = None,
    ) -> xr.Dataset:  # fmt: skip
        """Describe latents on some images, by this run's backbone and autoencoder or by others.

        CLIP's tokens of the general training images are left on disk for other chapters.
        """
        found, model = trained or self.trained, backbone or self.backbone
        general = isinstance(images, Subset) and images.parent is self.sets.train
        kept = model.remembering(self.store) if general and model is self.backbone else nullcontext()
        with kept:
            return make_atlas(
                found.sae, model, images, config, self.root, found.folder.name, workers=self.workers
            )

    def keep(
        self, name: str, kind: type[T], make: Callable[[], T], images: Iterable[ImageSet],
        models: Iterable[Backbone] = (), **inputs: Any,
    ) -> T:  # fmt: skip
        """Return what `make` returns of some images, from `results` where it was kept (`patchbook.kept`).

        models: backbones that are asked beside this run's own. inputs: what else decides it.
        """
        own = {
            "models": [model.fingerprint() for model in (self.backbone, *models)],
            "sae": self.sae.fingerprint(),
            "images": [one.fingerprint() for one in images],
            "seed": self.seed,
        }
        return keep(self.root, name, kind, make, own | inputs)

    def text(self, data_set: Dataset) -> Tensor:
        """Return the text vectors [C, e] of a data set's classes, by the scale's prompts."""
        return zero_shot_weights(self.backbone, data_set.classnames, self.setup.prompts(data_set))

    def choose(self, dataset: str) -> list[Dataset]:
        """Return the benchmarks of these names, with commas between them, or all for ''; refuses others."""
        known = {data_set.name: data_set for data_set in self.sets.benchmarks}
        wanted = [name.strip() for name in dataset.split(",")] if dataset else list(known)
        for name in wanted:
            if name not in known:
                raise PatchSAEError(f"dataset='{name}' is unknown; choose of {', '.join(known)}.")
        return [known[name] for name in dict.fromkeys(wanted)]

    @property
    def has_masks(self) -> bool:
        """Tell whether the test images come with the outlines of their objects."""
        return hasattr(self.sets.test, "scenes")

    @property
    def patches(self) -> np.ndarray:
        """Return the columns of the patches among the tokens."""
        return np.flatnonzero(self.backbone.token_kind == "patch")

    def __str__(self) -> str:
        return f"{self.backbone}\nSAE with {self.sae.d_sae:,} latents, from {self.sae_hash}"


def open_run(
    scale: str, *, data: str, model: str, pretrained: str, block: int, device: str, seed: int, results: str,
    images: int | None = None, expansion: int | None = None, l1: float | None = None, ghost: bool = True,
    workers: int = 0, activation: str | None = None, active: int | None = None, sae: str = "",
    pictures: str = "",
) -> Run:  # fmt: skip
    """Open what the parameters of a chapter ask for; the autoencoder is trained when it is first needed.

    None takes the scale's. With `activation` 'topk' and 'batchtopk', `active` latents per token are kept
    and nothing is penalised unless `l1` says so.

    Parameters
    ----------
    sae : folder, file or `hf:organisation/name` of an autoencoder to be taken as it is; '' trains one
    pictures : folder, shards, or set of another library in place of the scale's images (`open_images`)

    Raises
    ------
    PatchSAEError : as `scale`, `load_backbone`, the image sets and SAEConfig.
    """
    setup = open_scale(scale)
    if not pictures:
        setup.look_for(data)
    backbone = setup.backbone(model, pretrained, block=block, device=device)
    least = activation in ("topk", "batchtopk")
    changes = Changes(
        {
            "expansion": expansion,
            "l1": 0.0 if least and l1 is None else l1,
            "ghost": ghost,
            "activation": activation,
            "k": (active or setup.topk_sae.get("k")) if least else None,
        },
        {"images": images, "seed": seed},
    )
    sets = own_sets(pictures, backbone) if pictures else setup.sets(backbone, data)
    return Run(setup, backbone, sets, project_root() / results, changes, seed, workers, sae)


def pictures(batch: Tensor) -> list[np.ndarray]:
    """Turn uint8 images [B, 3, H, W] into a list of [H, W, 3]."""
    return list(batch.permute(0, 2, 3, 1).numpy())


def shown(images: ImageSet, indices: np.ndarray) -> tuple[list[np.ndarray], list[str]]:
    """Return the pictures and class names of some images; indices below 0 are left out."""
    batch = images.load(np.asarray(indices)[np.asarray(indices) >= 0])
    return pictures(batch.images), [images.classnames[label] for label in batch.labels]
