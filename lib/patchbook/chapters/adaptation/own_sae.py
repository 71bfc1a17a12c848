"""Fig. 11: an autoencoder trained on the adapted model beside one trained on CLIP."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import xarray as xr

from patchbook.chapters.adaptation.ranked import area
from patchbook.chapters.adaptation.tasks import Adaptation
from patchbook.chapters.verdicts_of_models import cohens_d, is_within
from patchbook.report import Finding, Verdict, finding
from patchbook.tables import in_percent
from patchsae.latents.atlas import AtlasConfig
from patchsae.masking.sweep import MaskingConfig, curves, sweep
from patchsae.runs.intervals import bootstrap


class OwnSAEs(NamedTuple):
    """Statistics of both dictionaries, and masking with each in each model."""

    atlases: dict[str, xr.Dataset]
    """By the model that the SAE was trained on."""
    panels: dict[str, dict[tuple[str, str], xr.Dataset]]
    areas: dict[tuple[str, str], np.ndarray]
    """On-curve of each image, by the model that was trained on and the one that classifies."""


def own_saes(
    a: Adaptation, images: int | None, atlas_images: int, rank_images: int, half_images: int,
    sizes: Sequence[int], include_prompt_tokens: bool,
) -> OwnSAEs:  # fmt: skip
    """Train both on so many images (None: the scale's) and mask the first data set's base classes."""
    run, t = a.run, next(iter(a.tasks.values()))
    less = run.changes.train | ({"images": images} if images else {})
    models = {"CLIP": run.backbone, "MaPLe": t.model}
    config = MaskingConfig(
        sizes=tuple(sizes), random=0, seed=run.seed, include_prompt_tokens=include_prompt_tokens
    )
    trained = {
        label: run.setup.trained_sae(run.sets.train, model, run.root, run.changes.sae, less, progress=False)
        for label, model in models.items()
    }
    sample, about = run.sets.train.sample(atlas_images, run.seed), t.halves["base"]
    test, counted_on = run.few(about.part.test, half_images), about.part.train.per_class(rank_images)
    described = AtlasConfig(tau=a.settings.tau, k=a.settings.k, empty_classes=True)
    atlases, panels, areas = {}, {}, {}
    for label, found in trained.items():
        atlases[label] = run.atlas(sample, described, models[label], found)
        by_pair = {}
        for classified, model in models.items():
            counted = run.atlas(counted_on, AtlasConfig(tau=a.settings.tau, k=1), model, found)
            text = t.texts[classified == "MaPLe"][about.keep]
            swept = sweep(found.sae, model, test, text, counted, config, run.root, found.folder.name)
            by_pair[classified, classified] = curves(swept, seed=run.seed, draws=500)
            areas[label, classified] = area(swept)
        panels[f"SAE trained on {label}, {t.title}, base"] = by_pair
    return OwnSAEs(atlases, panels, areas)


def fig_11(found: OwnSAEs, seed: int) -> Finding:
    """Judge that masking shows the same with either autoencoder."""
    models = ("CLIP", "MaPLe")
    change = np.mean([found.areas["MaPLe", m] - found.areas["CLIP", m] for m in models], 0)
    mean = in_percent(bootstrap(change, seed))
    brings_back = "The two may bring back different shares."
    why = {Verdict.DIFFERS: brings_back, Verdict.OPEN: brings_back}
    return finding(
        "Fig. 11",
        claim="Masking shows the same whether the autoencoder was trained on CLIP or on MaPLe.",
        quantity="accuracy on top-k, autoencoder of MaPLe minus that of CLIP, mean over k, models and "
        "images",
        unit="points",
        ours=mean,
        rule="the two are equivalent: the interval lies within a margin of ±5 points, this book's choice",
        **is_within(mean, 5, why=why)._asdict(),
        effect=cohens_d(change),
        effect_name="Cohen's d, paired over images",
    )
