"""Chapter 7: what the explorer shows, what two models have in common, and an experiment to repeat."""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from patchbook.chapters.opening import Run
from patchbook.chapters.vocabulary import scene_vocabulary
from patchbook.lessons import Lesson
from patchbook.report import Finding, finding
from patchsae.adaptation.prompt_files import find_prompts
from patchsae.explorer import Change, Explorer, ExplorerConfig, Pictures, ReferenceSet, Shown, write_blocks
from patchsae.explorer.answers import telling
from patchsae.explorer.blocks import read_activations
from patchsae.explorer.data import Activations, Groups, fires_on_nearly_everything, group_latents
from patchsae.images.sets import Dataset
from patchsae.latents.atlas import AtlasConfig
from patchsae.runs.errors import PatchSAEError
from patchsae.runs.intervals import bootstrap
from patchsae.runs.stage import project_root

USUAL = ("silhouettes", "sketch_activities", "twemoji_clothing", "openmoji_food", "openmoji_travel")
"""Data sets whose adapted models are shown where none is named."""


@dataclass(frozen=True)
class Amounts:
    """How much the page shows."""

    gallery: int
    """Images of each data set, half of them ones that only MaPLe gets right."""
    described: int
    """Training images that the statistics are taken over."""
    of_data_set: int
    """Test images of each data set that references are taken from."""
    known_scenes: int
    """Scenes of known content on which the names of latents are judged."""


class Pair(NamedTuple):
    """What an image activates in CLIP and in one adapted model, and their lists side by side."""

    clip: Activations
    adapted: Activations
    groups: Groups


@dataclass(frozen=True)
class Explored:
    """What chapter 7 shows and counts."""

    run: Run
    models: list[Shown]
    references: list[ReferenceSet]
    blocks: Path
    config: ExplorerConfig

    def explorer(self) -> Explorer:
        """Open the page's widget."""
        return Explorer(self.blocks, self.run.sae, self.run.sae_hash, self.models)

    def pairs(self, images: int) -> Iterator[list[Pair]]:
        """Yield, of each image of the gallery, CLIP's list beside that of each adapted model."""
        top, frequent = self.config.top, self.config.frequent
        left_out = fires_on_nearly_everything(self.references[0].atlas, frequent, self.run.sae.d_sae)
        for image in range(images):
            clip, *adapted = (read_activations(self.blocks, image, m) for m in range(len(self.models)))
            yield [Pair(clip, o, group_latents(clip, o, left_out, top=top)) for o in adapted]

    def __str__(self) -> str:
        files = list(self.blocks.glob("*.js"))
        size = sum(path.stat().st_size for path in files)
        return f"{self.run}\n{len(files)} blocks, {size / 1e6:.1f} MB, in {self.blocks.name}"


def chosen_sets(run: Run, names: Sequence[str]) -> list[Dataset]:
    """Return the data sets whose adapted models can be chosen; none named takes five.

    Raises
    ------
    PatchSAEError : a name is unknown.
    """
    known = {data_set.name: data_set for data_set in run.sets.benchmarks}
    if unknown := [name for name in names if name not in known]:
        raise PatchSAEError(
            f"models names '{unknown[0]}', which is unknown; choose from {', '.join(known)}."
        )
    return [known[name] for name in names or [n for n in USUAL if n in known] or list(known)[:5]]


def open_explored(
    run: Run, prompts: str, prompt_seed: int, models: Sequence[str], amounts: Amounts,
    config: ExplorerConfig, statistics: AtlasConfig,
) -> Explored:  # fmt: skip
    """Write everything that the page shows, or find it in results.

    Raises
    ------
    PatchSAEError : a data set is unknown, or has no prompts; as `write_blocks`.
    """
    setup, seed, backbone = run.setup, run.seed, run.backbone
    folder, chosen = prompts or project_root() / "artefacts" / "prompts", chosen_sets(run, models)
    adapted = [find_prompts(folder, d.name, backbone, prompt_seed) for d in chosen]
    shown = [Shown("CLIP", backbone)]
    shown += [Shown(f"MaPLe for {d.title}", model) for d, model in zip(chosen, adapted, strict=True)]
    embedded = setup.name == "embedded"
    general = "Scenes" if embedded else "ImageNet"
    described = {general: run.sets.train.sample(amounts.described, seed)}
    described |= {d.title: d.test.sample(amounts.of_data_set, seed) for d in chosen}
    references = [ReferenceSet(t, run.atlas(images, statistics), images) for t, images in described.items()]
    drawn = run.sets.test.sample(amounts.gallery, seed)
    gallery = [Pictures(general, drawn, setup.prompts(run.sets.benchmarks[0]))]
    for d, model in zip(chosen, adapted, strict=True):
        pool = Pictures(d.title, d.test.sample(amounts.of_data_set, seed + 1), setup.prompts(d))
        gallery.append(telling(pool, backbone, model, amounts.gallery, amounts.gallery // 2, seed))
    scenes = (amounts.known_scenes, backbone.image_size, seed, backbone.device)
    with backbone.remembering(run.store):  # which has seen most of the references
        blocks = write_blocks(
            run.sae, run.sae_hash, shown, gallery, references, run.root, config,
            vocabulary=scene_vocabulary(*scenes) if embedded else None,
        )  # fmt: skip
    return Explored(run, shown, references, blocks, config)


class Experiment(NamedTuple):
    """One picture whose class goes with one latent, or does not."""

    image: int
    label: str
    model: int
    title: str
    latent: int
    said: dict[str, dict]
    """Answers of CLIP and MaPLe, with the latent and without."""
    latents: int

    def best(self, name: str) -> str:
        """Write the first class of an answer with its probability."""
        answer = self.said[name]
        return f"{answer['classes'][0]} ({answer['share'][0]:.0%})"

    @property
    def gone(self) -> bool:
        """Tell whether the right answer is lost."""
        right = [self.said[name]["classes"][0] == self.label for name in ("MaPLe", "without")]
        return right == [True, False]

    def _repr_html_(self) -> str:
        lines = [
            f"Open picture {self.image} of the explorer, a {self.label}; compare CLIP with {self.title}.",
            f"CLIP says {self.best('CLIP')}.",
            f"{self.title} says {self.best('MaPLe')}.",
            f"Choose latent {self.latent} and press “Switch it off”.",
            f"{self.title} now says {self.best('without')}.",
            f"To the true class it gave {self.said['MaPLe']['true']:.1%}, now "
            f"{self.said['without']['true']:.1%}.",
            f"CLIP without the latent says {self.best('CLIP without')}.",
            f"So the answer {'goes' if self.gone else 'does not go'} with one latent of {self.latents:,}.",
            "Press “Undo” and it is back. Tick “Only on the chosen patch”: which patch decides?",
            "Turn the latent up instead, and see how sure the model becomes.",
        ]
        steps = "".join(f"<li>{html.escape(line)}</li>" for line in lines)
        state = {"image": self.image, "model": self.model, "latent": self.latent, "off": self.latent}
        address = "&".join(f"{key}={value}" for key, value in state.items())
        return (
            f"<ol>{steps}</ol><p>With <code>#{html.escape(address)}</code> at the end of its address this "
            "page opens with it switched off.</p>"
        )


def experiment(found: Explored, explorer: Explorer) -> Experiment | None:
    """Ask both models about the page's first picture, with and without the latent that it opens on."""
    first = explorer.index["first"]
    if first is None or not explorer.index["live"]:
        return None
    image, which, latent = first["image"], first["adapted"], first["latent"]
    without = Change({latent: 0.0})
    asked = {
        "CLIP": (0, None),
        "MaPLe": (which, None),
        "without": (which, without),
        "CLIP without": (0, without),
    }
    said = {name: explorer.answer(image, model, change) for name, (model, change) in asked.items()}
    label = explorer.index["gallery"][image]["title"]
    return Experiment(image, label, which, found.models[which].title, latent, said, found.run.sae.d_sae)


def experiment_lesson(tried: Experiment | None) -> Lesson:
    """Say what became of the answer."""
    if tried is None:
        return Lesson("No picture of this small gallery has an answer to lose.", "fig-12", 1)
    verb = "is lost" if tried.gone else "stays"
    return Lesson(
        f"Of a {tried.label}, CLIP says {tried.best('CLIP')} and {tried.title} {tried.best('MaPLe')}; with "
        f"latent {tried.latent} of {tried.latents:,} switched off the latter says {tried.best('without')}: "
        f"the answer {verb}.",
        "fig-12",
        1,
    )


def fig_12(found: Explored, explorer: Explorer) -> Finding:
    """Report how many of the strongest latents CLIP and adapted models have in common."""
    images, adapted = len(explorer.index["gallery"]), len(found.models) - 1
    common = [np.mean([len(one.groups.common) for one in pairs]) for pairs in found.pairs(images)]
    notices = explorer.index["notices"]
    return finding(
        "Fig. 12",
        can_fail=False,
        claim="A demo shows, for an image and a patch, which top latents CLIP and adapted models share.",
        quantity=f"latents in common of the {found.config.top} strongest of both models, mean over "
        f"{images} images and {adapted} adapted models",
        ours=bootstrap(np.array(common), found.run.seed),
        unit="latents",
        rule="the statistics and references of every data set fit, and there is more than one adapted "
        "model",
        reason="data lacking",
        verdict=not notices and adapted > 1,
        why=" ".join(notices) or ("" if adapted > 1 else "There is no second adapted model."),
    )


def common_lesson(found: Explored, judged: Finding) -> Lesson:
    """Say what the lists have in common."""
    top = found.config.top
    return Lesson(
        f"Of the {top} strongest latents of a picture, CLIP and an adapted model share "
        f"{judged.measured()}.",
        judged.label,
        2,
    )


def active_in_the_other(found: Explored, explorer: Explorer) -> Lesson:
    """Say how many latents on one model's list alone are active in the other model too."""
    top, too = found.config.top, []
    for pairs in found.pairs(len(explorer.index["gallery"])):
        for clip, other, groups in pairs:
            too += [latent in other.latent for latent, _ in groups.only_clip]
            too += [latent in clip.latent for latent, _ in groups.only_adapted]
    share = np.mean(too) if too else np.nan
    meaning = "mostly turns latents up and down" if share > 0.5 else "brings latents that the other lacks"
    return Lesson(
        f"Of {len(too):,} latents among one model's {top} strongest alone, {sum(too):,} are active in the "
        + (f"other model too ({share:.0%}): adaptation {meaning}." if too else "other model too."),
        "fig-12",
        3,
    )
