"""Chapter 2, Fig. 10 and 14: the same latents on data sets that the autoencoder was not trained on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import xarray as xr

from patchbook.chapters.opening import Run, pictures, shown
from patchbook.chapters.verdicts_of_latents import at_home, consistent_elsewhere
from patchbook.report import Finding, finding
from patchsae.images.sets import Dataset, ImageSet
from patchsae.latents.atlas import AtlasConfig
from patchsae.latents.label_statistics import pick_shared, pick_typical, purity

SETS, REFERENCES, FRESH = 5, 8, 48


@dataclass(frozen=True)
class Elsewhere:
    """Statistics of the same latents on every data set."""

    run: Run
    config: AtlasConfig
    sets: Mapping[str, Dataset]
    tests: Mapping[str, ImageSet]
    atlases: Mapping[str, xr.Dataset]
    own: xr.Dataset
    """On the images that the autoencoder was trained on."""

    @property
    def first(self) -> list[str]:
        """Return the data sets of Fig. 10."""
        return list(self.atlases)[:SETS]

    @property
    def titles(self) -> list[str]:
        """Return the titles of all data sets."""
        return [self.sets[name].title for name in self.atlases]

    @cached_property
    def typical(self) -> list[int]:
        """Return the latent typical of each data set (Fig. 14)."""
        return pick_typical(list(self.atlases.values()))

    def shared(self) -> list[dict[str, tuple]]:
        """Return Fig. 10: references of two latents that have all of them in the first data sets."""
        figures = []
        for latent in pick_shared(self.own, [self.atlases[name] for name in self.first]):
            rows = {}
            for name in self.first:
                column = self.atlases[name].isel(latent=latent)
                title = f"latent {latent}, {self.sets[name].title}: {caption(column)}"
                rows[title] = shown(self.tests[name], column.top_index.values[:REFERENCES])
            figures.append(rows)
        return figures

    def matrix(self) -> tuple[list, list[str], list[str]]:
        """Return Fig. 14: the first reference of each typical latent in each data set."""
        cells = []
        for latent in self.typical:
            line = []
            for name, atlas in self.atlases.items():
                column = atlas.isel(latent=latent)
                index = int(column.top_index[0])
                fires = index >= 0
                picture = pictures(self.tests[name].load([index]).images)[0] if fires else None
                line.append((picture, caption(column) if fires else ""))
            cells.append(line)
        rows = [f"{title}\n{latent}" for title, latent in zip(self.titles, self.typical, strict=True)]
        return cells, rows, self.titles


def open_elsewhere(run: Run, images: int, config: AtlasConfig, own: xr.Dataset) -> Elsewhere:
    """Describe the latents on test images of every data set."""
    sets = {d.name: d for d in (*run.sets.benchmarks, *run.sets.others)}
    tests = {name: d.test.sample(images, run.seed) for name, d in sets.items()}
    atlases = {name: run.atlas(test, config) for name, test in tests.items()}
    return Elsewhere(run, config, sets, tests, atlases, own)


def caption(column: xr.Dataset) -> str:
    """Write frequency and mean activation, as logarithms to base 10, and entropy of a latent."""
    f, a = (
        round(np.log10(max(float(column[v]), 1e-9)), 1) + 0.0
        for v in ("image_frequency", "mean_activation")
    )
    return f"f {f:.1f}, a {a:.1f}, e {float(column.entropy):.1f}"


def fig_10(found: Elsewhere, k: int) -> Finding:
    """Judge Fig. 10 on all data sets but the first, which is like the images of training."""
    others, seed = found.first[1:], found.run.seed
    observed = np.full((len(others), found.run.sae.d_sae), np.nan)
    null, special = observed.copy(), found.own.image_frequency_tau.values <= 0.5
    for row, name in enumerate(others):
        atlas = found.atlases[name]
        full = special & (atlas.top_index.values[:REFERENCES] >= 0).all(0)
        if full.any():
            pure = purity(atlas.top_label.values[:REFERENCES, full], seed=seed)
            observed[row, full], null[row, full] = pure.observed, pure.null.mean()
    return finding(
        "Fig. 10",
        claim="A latent retrieves a consistent concept from data sets that the autoencoder was not trained "
        "on.",
        quantity=f"share of the commonest label among {min(k, REFERENCES)} references, minus labels dealt "
        f"at random, last {len(others)} sets",
        unit="points",
        rule="the interval over latents lies above 0",
        **consistent_elsewhere(observed, null, seed).told(),
        effect_name="times the share if labels are dealt at random",
    )


def fig_14(found: Elsewhere, images: int, k: int) -> Finding:
    """Judge Fig. 14 on images that had no part in choosing the latents."""
    share, fresh = [], []
    for name, data_set in found.sets.items():
        other = _others(found, data_set, images)
        fresh.append(len(other) >= k)
        # without enough of them a set stands beside the others, but is not counted itself
        about = found.run.atlas(other, found.config) if fresh[-1] else found.atlases[name]
        share.append(about.dataset_count.values[found.typical] / about.attrs["tokens"])
    own = np.array(share).argmax(0) == np.arange(len(found.typical))
    return finding(
        "Fig. 14",
        claim="Each data set has a latent that represents it, whose references elsewhere show the same.",
        quantity="data sets whose latent is most frequent there on other images too",
        unit="%",
        rule="the interval lies above chance",
        **at_home(own, np.array(fresh), found.titles).told(),
        effect_name="times chance",
    )


def _others(found: Elsewhere, data_set: Dataset, images: int) -> ImageSet:
    """Return images that the figure did not use; ImageNet's variants have test images alone."""
    rest = data_set.train
    if not len(rest):
        used = found.tests[data_set.name].indices
        rest = data_set.test.subset(np.setdiff1d(np.arange(len(data_set.test)), used))
    return rest.sample(min(images, FRESH), found.run.seed)
