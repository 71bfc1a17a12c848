"""The two scales of the book: what a notebook uses when its parameters do not say otherwise."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from patchbook.scenes.embedded import DATASETS, embedded_dataset, scene_set
from patchbook.shipped import find_or_train
from patchsae.clip.backbone import OPENAI_IMAGENET_TEMPLATES, Backbone, load_backbone
from patchsae.images.benchmark_sets import open_benchmark, open_found
from patchsae.images.benchmark_table import BENCHMARKS, ROBUSTNESS
from patchsae.images.sets import Dataset, ImageSet
from patchsae.runs.artefacts import artefact
from patchsae.runs.errors import PatchSAEError
from patchsae.sae.model import SAEConfig
from patchsae.training.trainer import TrainConfig, Trained


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


class Task(NamedTuple):
    """What an autoencoder is trained from, but for the backbone."""

    images: ImageSet
    sae: SAEConfig
    train: TrainConfig


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
    different_images: int = 0
    """Training images, drawn once, whose tokens are cached and passed over many times; 0 streams all of the
    set anew."""
    topk_sae: Mapping[str, object] = field(default_factory=dict)
    """What the TopK autoencoder beside the main one changes in SAEConfig; none takes no such one."""
    topk_train: Mapping[str, object] = field(default_factory=dict)
    """What its training changes in TrainConfig."""
    ships: tuple[tuple[int, int], ...] = ()
    """Pairs of block and seed whose autoencoder by this scale's recipe is in artefacts/sae."""

    def backbone(self, model: str | None = None, pretrained: str | None = None, **options) -> Backbone:
        """Load this scale's backbone, or another one at the same block."""
        return load_backbone(
            model or self.model, pretrained or (None if model else self.pretrained),
            **{"block": self.block, **options},
        )  # fmt: skip

    def look_for(self, data: str) -> None:
        """Refuse a folder without the scale's images, before a model is fetched for them."""
        if self.name == "paper":
            _look_for_photographs(data)

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
        """Return the shipped SAE of these settings, or train it under `root`, or find it there.

        `sae` and `train` change fields of SAEConfig and TrainConfig; a value of None leaves the scale's.
        """
        task = self.task(images, backbone, root, sae, train)
        return find_or_train(
            task.images, backbone, task.sae, task.train, root, progress,
            expected=self._is_own(images, backbone, task),
        )  # fmt: skip

    def task(
        self,
        images: ImageSet,
        backbone: Backbone,
        root: Path,
        sae: Mapping[str, object] = MappingProxyType({}),
        train: Mapping[str, object] = MappingProxyType({}),
    ) -> Task:
        """Return what `trained_sae` asks for."""
        fields = {"d_in": backbone.d_model, "expansion": self.expansion, "l1": self.l1}
        training = replace(self.train, **_given(train))
        if self.different_images:
            training = replace(training, cache=training.cache or str(root))
            # never more than the run sees; the same for all seeds, which then share a cache
            few = min(self.different_images, training.images)
            images = images.sample(few) if few < len(images) else images
        return Task(images, SAEConfig(**fields | _given(sae)), training)

    def _is_own(self, images: ImageSet, backbone: Backbone, task: Task) -> bool:
        """Tell whether a task is one whose result `make saes` puts into the repository."""
        own = SAEConfig(d_in=backbone.d_model, expansion=self.expansion, l1=self.l1)
        seed, cache = task.train.seed, task.train.cache
        return (
            (backbone.block, seed) in self.ships
            and (task.sae, task.train) == (own, replace(self.train, seed=seed, cache=cache))
            and backbone.name == Path(self.model).name
            and images.fingerprint() == self.sets(backbone, "").train.fingerprint()
        )


def _given(changes: Mapping[str, object]) -> dict[str, object]:
    return {key: value for key, value in changes.items() if value is not None}


def _embedded_sets(backbone: Backbone, data: str) -> Sets:
    device = backbone.device
    benchmarks = tuple(embedded_dataset(name, device=device) for name in DATASETS)
    return Sets(scene_set("train", device=device), scene_set("test", device=device), benchmarks)


def _photographs(backbone: Backbone, data: str) -> Sets:
    _look_for_photographs(data)
    imagenet = open_benchmark("imagenet", data, backbone.frame)
    others = open_found(data, backbone.frame, BENCHMARKS[1:])
    shown = open_found(data, backbone.frame, (*ROBUSTNESS, "cifar-100"))
    return Sets(imagenet.train, imagenet.test, (imagenet, *others), shown)


def _look_for_photographs(data: str) -> None:
    needs = "the folder that holds imagenet/images/{train,val} and may hold the other benchmarks."
    if not data:
        raise PatchSAEError(f"scale='paper' needs the parameter data: {needs}")
    if not (Path(data) / "imagenet" / "images" / "train").is_dir():
        raise PatchSAEError(f"data='{data}' holds no folder imagenet/images/train: give {needs}")


def scale(name: str) -> Scale:
    """Return the scale of that name.

    Raises
    ------
    PatchSAEError : unknown name.
    """
    if name == "embedded":
        return Scale(
            "embedded", str(artefact("small_clip")), None, block=11,
            expansion=8, l1=7e-4, templates=None, sets=_embedded_sets,
            # chosen by artefacts/sae/search.py
            train=TrainConfig(images=108_000, token_batch=512, warmup_steps=200, lr=1e-3, decay_from=0.3),
            different_images=6_000, topk_sae={"activation": "topk", "k": 16, "l1": 0.0},
            ships=((11, 0), (11, 1), (11, 2), (2, 0), (5, 0), (8, 0)),
        )  # fmt: skip
    if name == "paper":
        return Scale(
            "paper", "ViT-B-16-quickgelu", "openai", block=11, expansion=64, l1=8e-5,
            templates=OPENAI_IMAGENET_TEMPLATES, sets=_photographs, train=TrainConfig(),
        )  # fmt: skip
    raise PatchSAEError(f"scale='{name}' is unknown; choose 'embedded' or 'paper'.")
