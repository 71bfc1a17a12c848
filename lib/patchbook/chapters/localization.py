"""Chapter 3, Fig. 2 and 4: which latents are active where, and which two domains share."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from patchbook.chapters.mask_scores import MaskScores
from patchbook.chapters.opening import Run, pictures, shown
from patchbook.chapters.verdicts_of_latents import NO_MASKS, Found, lacking, shared_across
from patchbook.figures import Level, Shown
from patchbook.lessons import Lesson, lesson
from patchbook.report import Finding, finding
from patchbook.tables import estimate
from patchsae.clip.backbone import Backbone
from patchsae.images.sets import ImageSet
from patchsae.latents.atlas import AtlasConfig
from patchsae.latents.best_latents import choose, score_of
from patchsae.latents.maps import Upsampling, latent_maps, masked_images, patch_cover
from patchsae.latents.scores import Metric
from patchsae.runs.intervals import bootstrap

HEADINGS = ("map", "patch × activation", "bilinear")
PAIR = ("openmoji", "sketch")
"""The two domains of Fig. 4."""


class Described(NamedTuple):
    """The images that latents are described on, and what was found."""

    atlas: xr.Dataset
    images: ImageSet
    config: AtlasConfig

    @property
    def tau(self) -> float:
        """Return the threshold of Eq. 4."""
        return self.config.tau

    def references(self, latent: int, n: int = 5) -> tuple[list[np.ndarray], list[str]]:
        """Return the first references of a latent, at most n, and their class names."""
        return shown(self.images, self.atlas.top_index.values[:n, latent])

    @property
    def usual(self) -> np.ndarray:
        """Tell which latents may be shown: with all references, and not active on nearly everything."""
        full, frequency = (self.atlas.top_index.values >= 0).all(0), self.atlas.image_frequency_tau.values
        return full & (frequency <= max(0.5, np.median(frequency[full])))


def describe(run: Run, images: int, tau: float, k: int) -> Described:
    """Describe latents on training images."""
    drawn = run.sets.train.sample(images, run.seed)
    config = AtlasConfig(tau=tau, k=k, empty_classes=True)  # a sample may miss a class
    return Described(run.atlas(drawn, config), drawn, config)


def strongest(activation: np.ndarray, allowed: np.ndarray, n: int = 1) -> np.ndarray:
    """Return up to n allowed latents that are active, the highest first, ties to the lower number."""
    activation = np.where(allowed, activation, 0)
    order = np.argsort(-activation, kind="stable")[:n]
    return order[activation[order] > 0]


class Scene(NamedTuple):
    """The scene of Fig. 2 and 9, and two patches of it."""

    images: Tensor
    """[1, 3, H, W]."""
    label: int
    marked: list[int]
    box: list[tuple[float, float, float, float]]
    """Left, top, width and height of each marked patch, px."""

    @property
    def picture(self) -> np.ndarray:
        """Return the picture [H, W, 3]."""
        return pictures(self.images)[0]


def open_scene(run: Run) -> Scene:
    """Take the first scene with two visible objects and no word; without masks, the first test image."""
    rows, columns = run.backbone.grid
    middle = rows // 2 * columns
    index, marked = 0, [middle + columns // 4, middle + 3 * columns // 4]
    if run.has_masks:
        index, marked = _two_objects(run.sets.test, run.backbone)
    scene, side = run.sets.test.load([index]), run.backbone.image_size / columns
    box = [(patch % columns * side, patch // columns * side, side, side) for patch in marked]
    return Scene(scene.images, int(scene.labels[0]), marked, box)


def _two_objects(images: ImageSet, backbone: Backbone) -> tuple[int, list[int]]:
    for index in range(len(images)):
        scenes = images.scenes([index])
        if (scenes.concepts[0] >= 0).sum() == 2 and scenes.word[0] < 0:
            covers = [patch_cover(scenes.masks == s, backbone.grid)[0].numpy() for s in (1, 2)]
            if min(cover.max() for cover in covers) > 0.5:
                return index, [middle_patch(cover, backbone.grid[1]) for cover in covers]
    raise AssertionError("the test scenes hold no two visible objects")


def middle_patch(cover: np.ndarray, columns: int) -> int:
    """Return the patch with the highest cover [P], of these the one nearest to the centre of all cover."""
    y, x = np.divmod(np.arange(len(cover)), columns)
    centre = (np.stack([y, x]) * cover).sum(1) / cover.sum()
    return int(np.lexsort((np.hypot(y - centre[0], x - centre[1]), -cover.round(3)))[0])


@torch.no_grad()
def levels(run: Run, described: Described, scene: Scene) -> list[Level]:
    """Return Fig. 2: what is active in each marked patch, the image, its class and the data set."""
    tokens = run.backbone.residual(run.backbone.normalize(scene.images)).float()
    f = run.sae.encode(tokens)[0].cpu().numpy()  # [T, S]
    on_patches, atlas, above = tokens[:, run.patches], described.atlas, "tokens above τ"
    class_name = run.sets.test.classnames[scene.label]
    asked = [
        *(
            (f"patch {n}", "activation", f[run.patches[patch]], scene.box[n - 1])
            for n, patch in enumerate(scene.marked, 1)
        ),
        ("image", above, (f > described.tau).sum(0), None),
        (f"class: {class_name}", above, atlas.class_count.values[scene.label], None),
        ("data set", above, atlas.dataset_count.values, None),
    ]
    return [
        _level(run, described, scene, on_patches, title, unit, activation, box)
        for title, unit, activation, box in asked
    ]


def _level(run, described, scene, on_patches, title, unit, activation, box) -> Level:
    found = strongest(activation, described.usual)
    if not len(found):
        return Level(title, unit, activation, box, 0, Shown("no such latent is active", [], [], []))
    latent = int(found[0])
    masks = [masked_images(run.sae, run.backbone, scene.images, latent, mode)[0] for mode in Upsampling]
    soft = latent_maps(run.sae, on_patches, [latent])[0, 0].view(*run.backbone.grid).numpy()
    return Level(
        title, unit, activation, box, latent,
        Shown(f"latent {latent}: references", [soft, *masks], *described.references(latent)),
    )  # fmt: skip


def fig_2(scores: MaskScores | None) -> Finding:
    """Judge Fig. 2."""
    found = scores.pointing() if scores else lacking(NO_MASKS)
    return finding(
        "Fig. 2",
        claim="A latent's activations on the patches show where its concept is in the image.",
        quantity="pointing game, best latent of the class, minus the best one of a random SAE",
        unit="points",
        rule="the best latent points better than the object's area would and better than an untrained "
        "SAE's",
        **found.told(),
        effect_name="Cohen's d, paired over scenes",
    )


class Domains(NamedTuple):
    """Fig. 4: one class in two domains."""

    about: str
    pictures: dict[str, np.ndarray]
    counts: dict[str, np.ndarray]
    """Tokens above τ by domain [S]."""
    rows: dict[int, Shown]
    """By latent: exclusive to either image, and shared."""


@torch.no_grad()
def domains(run: Run, described: Described, scores: MaskScores | None) -> Domains:
    """Compare two images of one class: which latents only one of them has, and which both."""
    about, pair = _typical(scores) if scores else _first_two(run)
    both = run.backbone.normalize(torch.cat(list(pair.values())))
    streams = run.sae.encode(run.backbone.residual(both).float())
    counts, allowed = (streams > described.tau).sum(1).cpu().numpy(), described.usual
    a, b = counts
    tops = [set(strongest(c, allowed, 10)) for c in counts]
    either = set(np.flatnonzero(allowed & (counts > 0).all(0)))
    ranked = {
        "only in the first": (tops[0] - tops[1], a - b),
        "only in the second": (tops[1] - tops[0], b - a),
        "in both": (tops[0] & tops[1] or either, np.minimum(a, b)),
    }
    rows = {}
    for title, (among, rank) in ranked.items():
        if not among:
            continue
        latent = max(sorted(among), key=lambda s, rank=rank: rank[s])
        masks = [masked_images(run.sae, run.backbone, image, latent)[0] for image in pair.values()]
        rows[latent] = Shown(f"latent {latent}, {title}", masks, *described.references(latent))
    drawn = {domain: pictures(image)[0] for domain, image in pair.items()}
    return Domains(about, drawn, dict(zip(pair, counts, strict=True)), rows)


def _typical(scores: MaskScores) -> tuple[str, dict[str, Tensor]]:
    """Return the class whose best latent has the median AP, and its first reported scene per domain."""
    table, held = scores.table, scores.held
    best = choose(table, Metric.PRECISION, scores.on)
    own = score_of(table, Metric.PRECISION, best[table.labels])
    by_class = np.bincount(table.labels[held], own[held]) / np.bincount(table.labels[held])
    typical, pair = int(np.argsort(by_class, kind="stable")[len(by_class) // 2]), {}
    for domain in PAIR:
        inside = held[table.group[held] == list(scores.domains).index(domain)]
        where = inside[table.labels[inside] == typical][0]
        pair[domain] = scores.domains[domain].load([table.index[where]]).images
    name = scores.domains[PAIR[0]].classnames[typical]
    about = (
        f"class {name}: AP {by_class[typical]:.2f}, median of {len(by_class)}; best latent {best[typical]}"
    )
    return about, pair


def _first_two(run: Run) -> tuple[str, dict[str, Tensor]]:
    test = run.sets.test
    where = np.flatnonzero(test.labels == test.labels[0])[:2]
    return f"class {test.classnames[test.labels[0]]}", {f"image {i}": test.load([i]).images for i in where}


class Overlap(NamedTuple):
    """How many of the ten strongest latents first scenes of two domains share, by class [C]."""

    same: np.ndarray
    """With the same class in the other domain."""
    other: np.ndarray
    """Mean over the other classes there."""
    seed: int

    def __str__(self) -> str:
        gap, same, other = (
            estimate(bootstrap(values, self.seed))
            for values in (self.same - self.other, self.same, self.other)
        )
        return (
            f"Shared among the ten strongest latents: {same} for the same class, {other} for different "
            f"classes, {len(self.same)} classes; difference {gap}."
        )


def overlap(described: Described, scores: MaskScores, seed: int) -> Overlap:
    """Count what the first reported scenes of each class share across the two domains."""
    table, held, firsts = scores.table, scores.held, {}
    for domain in PAIR:
        inside = held[table.group[held] == list(scores.domains).index(domain)]
        order = inside[np.unique(table.labels[inside], return_index=True)[1]]
        rows = scores.activations()[order].toarray()
        firsts[domain] = [set(strongest(row, described.usual, 10)) for row in rows]
    shared = np.array([[len(a & b) for b in firsts[PAIR[1]]] for a in firsts[PAIR[0]]])
    same = shared.diagonal()
    return Overlap(same, (shared.sum(1) - same) / (len(shared) - 1), seed)


def fig_4(found: Overlap | None) -> Finding:
    """Judge Fig. 4."""
    told: Found = shared_across(*found) if found else lacking(NO_MASKS)
    return finding(
        "Fig. 4",
        claim="Images of a class in two domains share latents of the class and have others of their own.",
        quantity="latents shared among the ten strongest, same class minus different classes",
        unit="latents",
        rule="the interval lies above 0",
        **told.told(),
        effect_name="Cohen's d, paired over classes",
    )


def fig_4_lesson(judged: Finding) -> Lesson:
    """Say in one sentence what two drawings of one class share."""
    return lesson(
        judged, 2,
        holds="Two drawings of one thing in different styles share more of their ten strongest latents "
        "than drawings of two things: {} more.",
        fails="Two drawings of one thing in different styles share no more latents than drawings of two "
        "things: {}.",
        open_="Whether two drawings of one thing share more latents than drawings of two things is not "
        "clear: {}.",
    )  # fmt: skip
