"""Chapter 2: statistics of latents on one set of images, and whether they fire on the objects."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import xarray as xr

from patchbook.chapters.opening import Run, shown
from patchbook.chapters.verdicts_of_latents import in_two_clusters
from patchbook.lessons import Lesson, lesson
from patchbook.report import Finding, finding
from patchbook.tables import Estimate, Table, estimate, fixed
from patchsae.images.sets import ImageSet
from patchsae.latents.label_statistics import Purity, co_activation, purity
from patchsae.latents.maps import Mass, fired, mass_inside, patch_cover, patch_tokens
from patchsae.runs.intervals import Interval, bootstrap_ratio

FIELDS = {
    "image_frequency": "activated frequency", "token_frequency": "frequency over tokens",
    "mean_activation": "mean activation", "entropy": "label entropy (nat)",
    "entropy_references": "label entropy of references (nat)",
    "label_std": "standard deviation of label numbers",
}  # fmt: skip
QUANTILES = {"minimum": 0.0, "25 %": 0.25, "median": 0.5, "75 %": 0.75, "maximum": 1.0}


def alive(atlas: xr.Dataset) -> np.ndarray:
    """Return the numbers of the latents that fire."""
    return np.flatnonzero(atlas.image_frequency.values > 0)


def counted(atlas: xr.Dataset) -> str:
    """Say over how much the statistics are taken."""
    return (
        f"{atlas.attrs['images']:,} images, {atlas.attrs['tokens']:,} tokens\n"
        f"{len(alive(atlas)):,} of {atlas.sizes['latent']:,} latents fire"
    )


def quartile_table(atlas: xr.Dataset) -> Table:
    """Return the quartiles of each statistic over the latents that fire."""
    here, rows = alive(atlas), {}
    for name, title in FIELDS.items():
        values = atlas[name].values[here]
        rows[title] = {quantile: float(np.nanquantile(values, q)) for quantile, q in QUANTILES.items()}
    return Table("Statistics over the latents that fire.", rows, ("statistic",), folded=True)


def region_references(atlas: xr.Dataset, described: ImageSet, regions: dict[str, int]) -> dict[str, tuple]:
    """Return the references of the latent of each region of Fig. 3."""
    rows = {}
    for name, latent in regions.items():
        column = atlas.isel(latent=latent)
        title = (
            f"({name}) latent {latent}: frequency {float(column.image_frequency):.4f}, "
            f"mean activation {float(column.mean_activation):.4f}, entropy {float(column.entropy):.2f} nat"
        )
        rows[title] = shown(described, column.top_index.values)
    return rows


def fig_3(atlas: xr.Dataset, seed: int) -> Finding:
    """Judge Fig. 3."""
    here = alive(atlas)
    found = in_two_clusters(atlas.image_frequency.values[here], atlas.mean_activation.values[here], seed)
    return finding(
        "Fig. 3",
        claim="Rare latents have low and frequent ones high activation, in two large clusters.",
        quantity="rank correlation of frequency and mean activation over latents",
        rule="the interval lies above 0 and the density along the diagonal has more than one peak (a tenth "
        "of the highest, at least)",
        **found.told(),
        effect_name="R² of ranks: the share of either one's spread that goes with the other",
    )


def fig_3_lesson(judged: Finding) -> Lesson:
    """Say in one sentence how frequency and activation go together."""
    return lesson(
        judged, 3,
        holds="Frequent latents are strong ones (rank correlation {}), in more than one cluster, as in the "
        "paper.",
        fails=f"The paper's clusters of rare, weak and of frequent, strong latents are not here: rank "
        f"correlation {{}}. {judged.why}",
        open_="Whether frequent latents are the strong ones is not clear: rank correlation {}.",
    )  # fmt: skip


def co_activated(atlas: xr.Dataset, n: int = 30) -> tuple[np.ndarray, np.ndarray]:
    """Return which share of one latent's images each other shares [n, n], and the n latents.

    They are those that most often are among an image's strongest.
    """
    named = atlas.image_latent.values
    held = np.bincount(named[named >= 0], minlength=atlas.sizes["latent"])
    common = np.argsort(-held, kind="stable")[:n]
    together = co_activation(atlas, common)
    return together / np.maximum(together.diagonal()[:, None], 1), common


def reference_purity(atlas: xr.Dataset, seed: int) -> tuple[Purity, int]:
    """Return how pure the references are of the latents that have all of them, and how many these are."""
    full = np.flatnonzero((atlas.top_index.values >= 0).all(0))
    return purity(atlas.top_label.values[:, full], seed=seed), len(full)


def purity_table(found: Purity, latents: int) -> Table:
    """Return purity beside what labels dealt at random would give."""
    rows = {
        "latents with all references": latents,
        "mean purity": fixed(found.observed.mean(), 3),
        "null: mean": fixed(found.null.mean(), 3),
        "null: 97.5 % quantile": fixed(np.quantile(found.null, 0.975), 3),
        "share of latents above 0.5": fixed((found.observed > 0.5).mean(), 3),
    }
    return Table(
        "Purity of references by label.", {name: {"value": value} for name, value in rows.items()}, ("",)
    )


class OnObjects(NamedTuple):
    """How much of each latent's activation lies inside objects."""

    sums: Mass
    """Inside, expected and total mass of each latent."""
    ratio: Interval
    """Of what is inside to what an even spread would put there, all latents, over scenes."""

    @property
    def shares(self) -> tuple[float, float]:
        """Return the expected and the observed share inside, over all latents."""
        inside, expected, total = self.sums
        return expected.sum() / total.sum(), inside.sum() / total.sum()

    @property
    def by_latent(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the same of each latent that fires."""
        inside, expected, total = self.sums
        firing = total > 0
        return expected[firing] / total[firing], inside[firing] / total[firing]


def on_objects(run: Run, images: int) -> OnObjects | None:
    """Measure on test scenes how much of the activation lies inside objects; None without masks."""
    test = run.sets.test
    if not run.has_masks:
        return None
    where = np.random.default_rng(run.seed).permutation(len(test))[:images]
    return run.keep("mass-inside", OnObjects, lambda: _on_objects(run, where), [test], few=images)


@torch.no_grad()
def _on_objects(run: Run, where: np.ndarray) -> OnObjects:
    test, backbone, sae = run.sets.test, run.backbone, run.sae
    sums, by_scene = None, []
    for start in range(0, len(where), 16):
        scenes = test.scenes(where[start : start + 16])
        cover = patch_cover(scenes.masks > 0, backbone.grid)
        found = fired(sae, patch_tokens(backbone, scenes.images))
        part = mass_inside(found, cover, sae.d_sae)
        sums = part if sums is None else Mass(*(a + b for a, b in zip(sums, part, strict=True)))
        # the same sums over all latents of a scene instead of over all scenes of a latent
        by_scene.append(mass_inside(found._replace(latent=found.image), cover, len(cover)))
    inside, expected, _ = (np.concatenate(rows) for rows in zip(*by_scene, strict=True))
    return OnObjects(sums, bootstrap_ratio(inside, expected, run.seed))


def object_table(found: OnObjects) -> Table:
    """Return the share inside objects, and by how much it is more than even."""
    expected, observed = found.shares
    ratio = found.by_latent[1] / np.maximum(found.by_latent[0], 1e-12)
    rows: dict[str, Estimate | str] = {
        "even spread over the same images (share inside)": fixed(expected, 3),
        "activation mass inside objects (share)": fixed(observed, 3),
        "ratio": estimate(found.ratio, 3),
        "median ratio over latents": fixed(np.median(ratio), 3),
        "share of latents with a ratio of at least 2": fixed((ratio >= 2).mean(), 3),
    }
    return Table("Where activation lies.", {name: {"value": value} for name, value in rows.items()}, ("",))


def object_lesson(found: OnObjects | None) -> Lesson:
    """Say in one sentence whether latents fire on the objects."""
    if not found:
        text = "Whether latents fire on the objects cannot be asked: these images have no object masks."
        return Lesson(text, "on-objects", 2)
    clear = "more" if found.ratio.low > 1 else "less" if found.ratio.high < 1 else "neither more nor less"
    text = (
        f"Latents are active on objects {clear} than an even spread over the image would have it: the "
        f"share inside is {estimate(found.ratio)} times as large."
    )
    return Lesson(text, "on-objects", 2)
