"""Both models on every data set: latents counted on the same images, test images answered by both."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from patchbook.chapters.opening import MEMORY, Run
from patchbook.chapters.published import TABLE_1, Published
from patchbook.chapters.verdicts_of_models import ONE_SET, Judged
from patchsae.adaptation.prompt_files import MissingPrompts, find_prompts
from patchsae.adaptation.prompts import Method
from patchsae.adaptation.remapping import (
    Groups,
    Mixed,
    Parts,
    class_counts,
    compare_counts,
    mix_models,
    selection_half,
)
from patchsae.clip.backbone import Backbone, zero_shot_logits
from patchsae.images.sets import Dataset, ImageSet
from patchsae.latents.atlas import AtlasConfig
from patchsae.masking.through import edited_embeddings, text_digest
from patchsae.runs.errors import PatchSAEError
from patchsae.runs.intervals import Interval, bootstrap
from patchsae.runs.stage import project_root

CLIP, MAPLE = Parts(0, 0, 0), Parts(1, 1, 1)
# the data sets in EuroSAT's part: furthest from what CLIP was trained on, named before any result is seen
STRANGERS = ("eurosat", "silhouettes")


@dataclass(frozen=True)
class Settings:
    """How much of each data set is asked; 0 takes all."""

    tau: float = 0.2
    """Threshold of Eq. 4."""
    k: int = 5
    """Reference images per latent."""
    rank_images: int = 8
    """Training images per class that latents are counted on."""
    table_images: int = 240
    """Test images of base classes."""
    novel_images: int = 96
    """Test images of novel classes, in the table and under masks."""
    include_prompt_tokens: bool = False
    """Whether MaPLe's own tokens are counted too, as in the released code."""

    def __post_init__(self):
        if self.table_images == 1:
            raise PatchSAEError("table_images=1 leaves no image to test on: give at least 2, or 0 for all.")

    def test_images(self, half: str) -> int:
        """Return how many test images of a half are asked."""
        return self.table_images if half == "base" else self.novel_images


class Half(NamedTuple):
    """Base or novel classes of a data set."""

    part: Dataset
    keep: slice
    """Which classes of the whole set they are."""
    test: ImageSet
    mixed: Mixed
    """Who is right on `test`, for every mixture of the two models."""

    @property
    def chance(self) -> float:
        """Return the accuracy of guessing."""
        return 1 / len(self.part.classnames)


@dataclass(frozen=True)
class Task:
    """One data set under both models."""

    data_set: Dataset
    model: Backbone
    """MaPLe."""
    train: ImageSet
    """What latents are counted on."""
    atlases: tuple[Any, Any]
    """Of CLIP and of MaPLe."""
    texts: tuple[Tensor, Tensor]
    """Text vectors of CLIP and of MaPLe, all classes."""
    halves: Mapping[str, Half]
    chooses: np.ndarray
    """Which test images of base classes choose what is shown: bool [N]; the rest is measured on."""
    fresh: ImageSet
    """Test images of base classes that chose nothing, in the table or out of it."""
    counts: tuple[np.ndarray, np.ndarray]
    """Tokens above τ by class and latent [C, S], CLIP and MaPLe."""

    @property
    def name(self) -> str:
        """Return the data set's name."""
        return self.data_set.name

    @property
    def title(self) -> str:
        """Return its title."""
        return self.data_set.title

    def right(self, half: str, parts: Parts, latents: bool = False) -> np.ndarray:
        """Tell which test images of a half a mixture gets right: bool [N]."""
        mixed = self.halves[half].mixed
        return (mixed.latents if latents else mixed.tokens)[parts] == 0

    def moved(self, half: str = "base", latents: bool = False) -> np.ndarray:
        """Return for each test image 1 where MaPLe alone is right, -1 where CLIP alone is, else 0."""
        return self.right(half, MAPLE, latents).astype(float) - self.right(half, CLIP, latents)

    @property
    def base_counts(self) -> list[np.ndarray]:
        """Return the counts of base classes, CLIP and MaPLe."""
        return [counts[self.halves["base"].keep] for counts in self.counts]

    @property
    def groups(self) -> Groups:
        """Sort the latents of each base class into regions, by value."""
        return compare_counts(*self.base_counts)

    @cached_property
    def sizes(self) -> dict[str, np.ndarray]:
        """Count latents per base class in each region, by value: {region: [classes]}."""
        return {group: members.sum(1) for group, members in self.groups._asdict().items()}

    @property
    def off_diagonal(self) -> np.ndarray:
        """Count the latents of each base class that are off the diagonal: [classes]."""
        groups = self.groups
        return (groups.high_to_low | groups.low_to_high).sum(1)

    def class_gains(self) -> np.ndarray:
        """Return the gain of each base class on the images that choose, NaN where it has none of them."""
        test = self.halves["base"].test
        labels, change = test.labels[self.chooses], self.moved()[self.chooses]
        n = np.bincount(labels, minlength=len(test.classnames))
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.bincount(labels, change, len(n)) / n


@dataclass(frozen=True)
class Adaptation:
    """All data sets of a run under both models."""

    run: Run
    settings: Settings
    folder: Path
    """Where learned prompts are."""
    tasks: Mapping[str, Task]

    @cached_property
    def gain(self) -> dict[str, Interval]:
        """Return the gain in accuracy on base classes, by data set."""
        return {name: bootstrap(task.moved(), self.run.seed) for name, task in self.tasks.items()}

    @cached_property
    def choosing(self) -> dict[bool, dict[str, Interval]]:
        """Return the gain on the images that choose, with tokens as they are and through latents."""
        return {
            latents: {
                name: bootstrap(t.moved(latents=latents)[t.chooses], self.run.seed)
                for name, t in self.tasks.items()
            }
            for latents in (False, True)
        }

    @cached_property
    def by_gain(self) -> list[str]:
        """Sort data sets by their gain on the images that choose, the largest first."""
        return sorted(self.tasks, key=lambda name: -self.choosing[False][name].value)

    @property
    def lead(self) -> Task:
        """Return the data set with the largest gain."""
        return self.tasks[self.by_gain[0]]

    @property
    def stranger(self) -> str | None:
        """Return the title of the data set in EuroSAT's part, if it is in this run."""
        return next((self.tasks[name].title for name in STRANGERS if name in self.tasks), None)

    @property
    def stranger_words(self) -> str:
        """Name the data set in EuroSAT's part, for a sentence."""
        return self.stranger or "the set in the part of EuroSAT"

    @cached_property
    def published(self) -> dict[str, Published]:
        """Return the paper's rows of this run's data sets, or all where it has none of them."""
        return {name: TABLE_1[name] for name in self.tasks if name in TABLE_1} or TABLE_1

    def over_sets(self, of: Callable[[Task], np.ndarray]) -> Interval:
        """Average over data sets what is given per image of each, with an interval over images."""
        values = [of(task) for task in self.tasks.values()]
        total = sum(map(len, values))
        weighted = np.concatenate([v * total / (len(values) * len(v)) for v in values])
        return bootstrap(weighted, self.run.seed)

    def of_sets(self, found: Interval, judged: Judged) -> dict[str, Any]:
        """Return what a finding says of an interval over data sets; one set has none."""
        if len(self.tasks) > 1:
            return {"ours": found} | judged._asdict()
        return {"ours": float(found.value)} | ONE_SET._asdict()

    def prompts(self, name: str, seed: int, method: Method = Method.MAPLE) -> Backbone | None:
        """Return a model adapted to a data set, None where its prompts are not there."""
        try:
            return find_prompts(self.folder, name, self.run.backbone, seed, method)
        except MissingPrompts:
            return None

    def __str__(self) -> str:
        images = sum(len(half.test) for task in self.tasks.values() for half in task.halves.values())
        first = next(iter(self.tasks.values())).model
        return f"{first}\n{images:,} test images in {len(self.tasks)} data sets"


def open_adaptation(run: Run, settings: Settings, prompts: str, seed: int, dataset: str) -> Adaptation:
    """Count latents and answer test images under CLIP and under MaPLe, on one data set or on all.

    Parameters
    ----------
    prompts : folder of learned prompts; '' takes the repository's
    seed : seed of the prompts

    Raises
    ------
    PatchSAEError : an unknown data set; MissingPrompts where one has no prompts.
    """
    chosen = run.choose(dataset)
    folder = Path(prompts or project_root() / "artefacts" / "prompts")
    adapted = {d.name: find_prompts(folder, d.name, run.backbone, seed) for d in chosen}
    for model in (run.backbone, *adapted.values()):
        model.remember(MEMORY)
    tasks = {d.name: _open_task(run, settings, d, adapted[d.name]) for d in chosen}
    return Adaptation(run, settings, folder, tasks)


def _open_task(run: Run, settings: Settings, data_set: Dataset, model: Backbone) -> Task:
    per_class = settings.rank_images
    train = data_set.train.per_class(per_class) if per_class else data_set.train
    plain = AtlasConfig(tau=settings.tau, k=settings.k)
    prompted = AtlasConfig(
        tau=settings.tau, k=settings.k, include_prompt_tokens=settings.include_prompt_tokens
    )
    with model.remembering(None):  # the memory is for test images: these are not asked again
        atlases = run.atlas(train, plain), run.atlas(train, prompted, model)
    texts = run.text(data_set), model.class_weights(data_set.classnames)
    base, first = data_set.base(), len(data_set.base().classnames)
    halves = {}
    for name, part, keep in (
        ("base", base, slice(0, first)),
        ("novel", data_set.novel(), slice(first, None)),
    ):
        test = run.few(part.test, settings.test_images(name))
        words = tuple(text[keep] for text in texts)
        mixed = mix_models(run.sae, run.sae_hash, run.backbone, model, test, words, run.root)
        halves[name] = Half(part, keep, test, mixed)
    every, tested = base.test, halves["base"].test
    chooses = selection_half(tested.labels)
    drawn = every.sample(settings.table_images, run.seed).indices if settings.table_images else None
    used = (np.arange(len(every)) if drawn is None else drawn)[chooses]
    return Task(
        data_set, model, train, atlases, texts, halves, chooses,
        every.subset(np.setdiff1d(np.arange(len(every)), used)),
        (class_counts(atlases[0]), class_counts(atlases[1], settings.include_prompt_tokens)),
    )  # fmt: skip


def answers(run: Run, model: Backbone, images: ImageSet, *texts: Tensor) -> np.ndarray:
    """Return the class that a model names with each of some text vectors [C, e]: int64 [texts, N]."""

    def ask() -> np.ndarray:
        seen = edited_embeddings(model, images, [None])[0]
        said = [zero_shot_logits(model, seen, text).argmax(-1) for text in texts]
        return torch.stack(said).cpu().numpy()

    name = f"answers-{images.name.replace('/', '-')}"
    return run.keep(name, np.ndarray, ask, [images], [model], texts=[text_digest(text) for text in texts])


def hits(run: Run, model: Backbone, images: ImageSet, *texts: Tensor) -> np.ndarray:
    """Tell which images a model gets right with each of some text vectors: 0 or 1 [texts, N]."""
    return (answers(run, model, images, *texts) == images.labels).astype(float)


def pooled(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Join what is given per image of several data sets."""
    return np.concatenate(parts).astype(float)


def in_words(sizes: Mapping[str, float]) -> str:
    """Write the mean sizes of the regions."""
    return ", ".join(f"{size:.1f} {group.replace('_', '-')}" for group, size in sizes.items())
