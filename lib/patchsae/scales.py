"""The two scales of the book: what a notebook uses when its parameters do not say otherwise."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from .backbone import OPENAI_IMAGENET_TEMPLATES, Backbone, load_backbone
from .benchmark_sets import open_benchmark, open_found
from .benchmark_table import BENCHMARKS, ROBUSTNESS
from .embedded import DATASETS, embedded_dataset, scene_set
from .errors import PatchSAEError
from .images import Dataset, ImageSet
from .sae import SAEConfig
from .stage import project_root
from .training import TrainConfig, Trained, train_sae


class Sets(NamedTuple):
    """The image sets of a scale."""

    train: ImageSet
    """What the SAE is trained and described on."""
    test: ImageSet
    """The same kind of image, never trained on."""
    benchmarks: tuple[Dataset, ...]
    """Classification data sets, the general one first."""
    others: tuple[Dataset, ...] = ()
    """Sets that no table needs but Fig. 10 and 14 show: ImageNet's variants, CIFAR-100."""


@dataclass(frozen=True)
class Scale:
    """Backbone, data and hyper-parameters of one scale."""

    name: str
    """'embedded' or 'paper'."""
    model: str
    """open_clip model name, or a folder in open_clip's local-dir layout."""
    pretrained: str | None
    """open_clip tag, or a weights file, or None for what the folder holds."""
    block: int
    """Block after which the residual stream is read, counted from 1."""
    expansion: int
    """Latents per dimension of the residual stream."""
    l1: float
    """Weight of the L1 penalty."""
    train: TrainConfig
    """How the autoencoder is trained."""
    templates: tuple[str, ...] | None
    """Zero-shot prompts of the general data set; None takes its own."""
    sets: Callable[[Backbone, str], Sets]
    """Function of (backbone, data folder) that opens the image sets."""

    def backbone(self, model: str | None = None, pretrained: str | None = None, **options) -> Backbone:
        """Load this scale's backbone, or another one at the same block."""
        return load_backbone(
            model or self.model, pretrained or (None if model else self.pretrained),
            **{"block": self.block, **options},
        )  # fmt: skip

    def prompts(self, dataset: Dataset) -> tuple[str, ...]:
        """Return the zero-shot prompts of a data set: the ensemble for ImageNet's classes, else its own."""
        general = dataset.name.startswith("imagenet")  # its variants too
        return self.templates if self.templates and general else (dataset.template,)

    def trained_sae(
        self,
        images: ImageSet,
        backbone: Backbone,
        root: Path,
        sae: Mapping[str, object] = MappingProxyType({}),
        train: Mapping[str, object] = MappingProxyType({}),
        progress: bool = True,
    ) -> Trained:
        """Train this scale's SAE under `root`, or return it if it is there.

        `sae` and `train` change fields of SAEConfig and TrainConfig; a value of None leaves the scale's.
        """
        fields = {"d_in": backbone.d_model, "expansion": self.expansion, "l1": self.l1}
        config = SAEConfig(**fields | _given(sae))
        return train_sae(images, backbone, config, replace(self.train, **_given(train)), root, progress)


def _given(changes: Mapping[str, object]) -> dict[str, object]:
    return {key: value for key, value in changes.items() if value is not None}


def _embedded_sets(backbone: Backbone, data: str) -> Sets:
    device = backbone.device
    benchmarks = tuple(embedded_dataset(name, device=device) for name in DATASETS)
    return Sets(scene_set("train", device=device), scene_set("test", device=device), benchmarks)


def _photographs(backbone: Backbone, data: str) -> Sets:
    if not data:
        raise PatchSAEError(
            "scale='paper' needs the parameter data: the folder that holds imagenet/images/{train,val} and "
            "may hold the other benchmarks."
        )
    imagenet = open_benchmark("imagenet", data, backbone.image_size)
    others = open_found(data, backbone.image_size, BENCHMARKS[1:])
    shown = open_found(data, backbone.image_size, (*ROBUSTNESS, "cifar-100"))
    return Sets(imagenet.train, imagenet.test, (imagenet, *others), shown)


def scale(name: str) -> Scale:
    """Return the scale of that name.

    Raises
    ------
    PatchSAEError : unknown name.
    """
    if name == "embedded":
        return Scale(
            "embedded", str(project_root() / "artefacts" / "small_clip"), None, block=11,
            expansion=16, l1=3e-4, templates=None, sets=_embedded_sets,
            train=TrainConfig(images=20_000, token_batch=2048, warmup_steps=100, lr=5e-3),
        )  # fmt: skip
    if name == "paper":
        return Scale(
            "paper", "ViT-B-16-quickgelu", "openai", block=11, expansion=64, l1=8e-5,
            templates=OPENAI_IMAGENET_TEMPLATES, sets=_photographs, train=TrainConfig(),
        )  # fmt: skip
    raise PatchSAEError(f"scale='{name}' is unknown; choose 'embedded' or 'paper'.")
