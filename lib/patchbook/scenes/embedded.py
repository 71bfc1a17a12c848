"""The embedded data sets: scenes behind the interface that the paper's benchmarks have.

`scene_set` plays ImageNet's part (the autoencoder is trained and described on it). The eleven of
`DATASETS` stand in for the eleven benchmarks of Table 1: a drawing style and a Unicode group each, with
one that no part of the small CLIP has seen (silhouettes), as EuroSAT is for CLIP.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch

from patchbook.scenes.catalogue import concepts, trained_mask
from patchbook.scenes.pictograms import SILHOUETTE, STYLE_WORDS, SceneConfig, Scenes, render, uniforms
from patchbook.scenes.sprites import PHOTOS, STYLES, packages
from patchsae.images.sets import Batch, Dataset, ImageSet, short_hash
from patchsae.runs.errors import PatchSAEError

SINGLE = SceneConfig(objects=(1.0,), word_rate=0.0)
CLUTTERED = SceneConfig(objects=(0.6, 0.2, 0.12, 0.08), tint=0.2)


class SceneSet(ImageSet):
    """Scenes whose first object is the label; classes are balanced and interleaved.

    Parameters
    ----------
    name : also decides which scenes, with `split`
    classes : int [C], the concept of each label
    styles : the styles the first object may have, by position in STYLES (SILHOUETTE is one more)
    per_class : images of each class
    """

    def __init__(
        self,
        name: str,
        split: str,
        classes: Sequence[int],
        styles: Sequence[int],
        per_class: int,
        config: SceneConfig = SINGLE,
        device: str | torch.device = "cpu",
    ):
        self.name, self.split, self.config, self.device = name, split, config, device
        self.concept_of_label = np.asarray(classes, dtype=np.int64)
        self.styles = tuple(styles)
        self.classnames = tuple(concepts()[c].name for c in self.concept_of_label)
        self.labels = np.arange(per_class * len(self.concept_of_label)) % len(self.concept_of_label)

    def _style(self, indices: np.ndarray) -> np.ndarray:
        # among the styles this concept may be trained in, if the set has any of those
        trained = trained_mask()
        known = np.zeros((len(self.styles), len(concepts())), bool)
        for row, style in enumerate(self.styles):
            known[row] = trained[style] if style < len(STYLES) else True
        options = known[:, self.concept_of_label[self.labels[indices]]].T  # [B, styles]
        options = np.where(options.any(1, keepdims=True), options, True)
        weight = options / options.sum(1, keepdims=True)
        draw = uniforms(f"{self.name}/{self.split}/style", indices, 1)
        position = (draw >= weight.cumsum(1)[:, :-1]).sum(1)
        return np.asarray(self.styles)[position]

    def scenes(self, indices: Sequence[int]) -> Scenes:
        """Draw images together with their object masks, which are for scoring only."""
        indices = np.asarray(indices, dtype=np.int64)
        fixed = (self.concept_of_label[self.labels[indices]], self._style(indices))
        return render(self.split, self.name, indices, self.config, fixed, self.device)

    def load(self, indices: Sequence[int]) -> Batch:
        indices = np.asarray(indices, dtype=np.int64)
        images = self.scenes(indices).images
        return Batch(images, torch.from_numpy(self.labels[indices]), torch.from_numpy(indices))

    def fingerprint(self) -> str:
        return short_hash(
            [self.name, self.split, self.concept_of_label.tolist(), self.styles, len(self),
             asdict(self.config), [c._asdict() for c in concepts()], PHOTOS[self.split], packages()]
        )  # fmt: skip


def scene_set(split: str, per_class: int = 64, device: str | torch.device = "cpu") -> SceneSet:
    """Return the set that plays ImageNet's part: all trained concepts, cluttered, some words."""
    classes = np.flatnonzero(trained_mask().any(0))
    return SceneSet("scenes", split, classes, range(len(STYLES)), per_class, CLUTTERED, device)


@dataclass(frozen=True)
class _Recipe:
    title: str
    styles: tuple[int, ...]
    subgroups: tuple[str, ...]  # prefixes
    step: int = 1  # every step-th concept
    classes: int | None = None  # at most
    test: int = 16  # images per class


_OPENMOJI, _TWEMOJI, _SKETCH = range(len(STYLES))
_OBJECTS = ("household", "tool", "computer", "light & video", "science", "other-object")
_RECIPES = {
    "concepts": _Recipe("All concepts", (_OPENMOJI, _TWEMOJI, _SKETCH), ("",)),
    "openmoji_animals": _Recipe("OpenMoji animals", (_OPENMOJI,), ("animal",)),
    "twemoji_animals": _Recipe("Twemoji animals", (_TWEMOJI,), ("animal",)),
    "sketch_animals": _Recipe("Sketch animals", (_SKETCH,), ("animal",)),
    "openmoji_food": _Recipe("OpenMoji food", (_OPENMOJI,), ("food", "drink", "dishware")),
    "twemoji_food": _Recipe("Twemoji food", (_TWEMOJI,), ("food", "drink", "dishware")),
    "openmoji_travel": _Recipe("OpenMoji travel", (_OPENMOJI,), ("transport", "place")),
    "twemoji_clothing": _Recipe("Twemoji clothing", (_TWEMOJI,), ("clothing",)),
    "sketch_objects": _Recipe("Sketch objects", (_SKETCH,), _OBJECTS),
    "sketch_activities": _Recipe("Sketch activities", (_SKETCH,), ("sport", "game", "event")),
    "silhouettes": _Recipe("Silhouettes", (SILHOUETTE,), ("animal-mammal",), step=4, classes=10, test=64),
}
DATASETS = tuple(_RECIPES)


def embedded_dataset(
    name: str, train: int = 32, test: int | None = None, device: str | torch.device = "cpu"
) -> Dataset:
    """Return one of the eleven embedded data sets.

    Parameters
    ----------
    name : one of DATASETS
    train, test : images per class; None takes 16, and 64 of the set that has few classes, silhouettes

    Raises
    ------
    PatchSAEError : unknown name.
    """
    if name not in _RECIPES:
        raise PatchSAEError(f"dataset='{name}' is unknown; choose one of {', '.join(DATASETS)}.")
    recipe, known = _RECIPES[name], trained_mask().any(0)
    classes = [
        i
        for i, concept in enumerate(concepts())
        if known[i] and concept.subgroup.startswith(recipe.subgroups)
    ][:: recipe.step][: recipe.classes]
    look = STYLE_WORDS[recipe.styles[0]] if len(recipe.styles) == 1 else "picture"

    def half(split: str, per_class: int) -> SceneSet:
        return SceneSet(name, split, classes, recipe.styles, per_class, SINGLE, device)

    sets = {"train": half("train", train), "test": half("test", recipe.test if test is None else test)}
    classnames = sets["train"].classnames
    return Dataset(name, recipe.title, classnames, f"a {look} of a {{}}", **sets)


def domain_sets(
    split: str, classes: int, per_class: int, device: str | torch.device = "cpu"
) -> dict[str, SceneSet]:
    """Return cluttered scenes of the same classes in every style, by the style's name, silhouettes last.

    The classes are spaced evenly among the concepts that are trained in all three styles; no two sets share
    a scene.

    Raises
    ------
    PatchSAEError : more classes than there are.
    """
    known = np.flatnonzero(trained_mask().all(0))
    if not 1 <= classes <= len(known):
        raise PatchSAEError(f"classes={classes} must lie in 1..{len(known)}, the trained ones.")
    chosen = known[np.linspace(0, len(known) - 1, classes).round().astype(np.int64)]
    return {
        name: SceneSet(f"domain_{name}", split, chosen, (style,), per_class, CLUTTERED, device)
        for style, name in enumerate((*STYLES, "silhouette"))
    }
