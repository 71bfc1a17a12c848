"""Chapter 2: what known truth says of latents, as a table, figures and a finding."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import xarray as xr

from patchbook.chapters.factors import Factor
from patchbook.chapters.kept_truth import keep_truth
from patchbook.chapters.opening import Run, shown
from patchbook.chapters.truth import (
    Dictionary,
    Truth,
    TruthConfig,
    clearest,
    coverage,
    explained_by,
    selectivity,
)
from patchbook.chapters.verdicts_of_models import is_above
from patchbook.lessons import Lesson
from patchbook.report import Beyond, beyond
from patchbook.tables import Table, estimate, fixed, percent
from patchsae.images.sets import ImageSet
from patchsae.runs.intervals import Interval

TOLD = 0.9
"""Held-out AUROC from which on a level is told."""
GOAL = 60
"""Share of living latents that a known level is to explain, %."""
FACTORS = list(Factor)


def ask(run: Run, images: int, pairs: int) -> Truth | None:
    """Ask the latents what they stand for; None for images that were not drawn from plans."""
    if not run.has_masks:
        return None
    config = TruthConfig(images=images, pairs=pairs, seed=run.seed)
    return keep_truth(run.sae, run.backbone, config, run.root)


def told(truth: Truth, factor: Factor | None = None) -> dict[str, float]:
    """Return which share of the levels that were asked each dictionary tells."""
    found = {name: v[np.isfinite(v)] for name, v in coverage(truth, factor).items()}
    return {name: float((v >= TOLD).mean()) if len(v) else np.nan for name, v in found.items()}


def truth_table(truth: Truth) -> Table:
    """Return what each dictionary tells and how much of it is explained."""
    every, concepts, rows = told(truth), told(truth, Factor.OBJECT), {}
    for name in every:
        rows[name] = {
            "levels told": fixed(every[name], 3),
            "concepts told": fixed(concepts[name], 3),
            **dict.fromkeys(("living units", "explained", "mean AUROC", "median selectivity"), "–"),
        }
    for name, one in truth.explained.items():
        chosen = selectivity(truth.effects[name])[one.living]
        rows[str(name)] |= {
            "living units": f"{one.living.sum():,}",
            "explained": estimate(one.share, 3),
            "mean AUROC": fixed(np.nanmean(one.auroc), 3),
            "median selectivity": fixed(np.nanmedian(chosen), 2),
        }
    asked = np.isfinite(truth.ceiling).sum()
    caption = f"What is told and explained; {asked} levels have enough scenes to be asked."
    return Table(caption, rows, ("dictionary",))


class Drawn(NamedTuple):
    """What the figure of known truth shows."""

    shares: dict[str, Interval]
    told: dict[str, float]
    factors: dict[Factor, int]
    moved: np.ndarray
    owner: list[Factor]


def drawn(truth: Truth, per_factor: int = 8) -> Drawn:
    """Return explained shares, what explains latents, and what moves the clearest of each factor."""
    clear = clearest(truth, Dictionary.TRAINED, per_factor)
    level = truth.explained[Dictionary.TRAINED].level[clear]
    moved = truth.effects[Dictionary.TRAINED][:, clear]
    return Drawn(
        {name: one.share for name, one in truth.explained.items()},
        told(truth),
        dict(zip(Factor, explained_by(truth, Dictionary.TRAINED), strict=True)),
        moved / np.maximum(moved.sum(0), 1e-12),
        [FACTORS[f] for f in truth.levels.factor[level]],
    )


def explained(truth: Truth) -> Beyond:
    """Judge that most living latents are explained by a known factor."""
    trained, untrained = (
        truth.explained[name].share for name in (Dictionary.TRAINED, Dictionary.UNTRAINED)
    )
    found = Interval(*(100 * v for v in trained))
    ahead = "{:.1f} [{:.1f}, {:.1f}]".format(*(100 * v for v in truth.ahead))
    why = (
        f"Of the trained one {100 * trained.value:.1f} % are, of an untrained SAE of the same L0 "
        f"{100 * untrained.value:.1f} %; the difference is {ahead} points."
    )
    return beyond(
        "Most living latents are explained by a known factor",
        label="known-truth",
        quantity="share of living latents that a known level explains (AUROC ≥ .9 on other scenes)",
        ours=found,
        unit="%",
        rule=f"the interval lies above {GOAL} %",
        **is_above(found, GOAL, why=why)._asdict(),
        effect=trained.value / untrained.value if untrained.value else None,
        effect_name="times the untrained SAE's share",
    )


def explained_lesson(truth: Truth | None) -> Lesson:
    """Say in one sentence how many latents stand for something that is known."""
    if not truth:
        text = "What latents stand for is not known here: these images were not drawn from plans."
        return Lesson(text, "known-truth", 1)
    trained, untrained = (
        truth.explained[name].share for name in (Dictionary.TRAINED, Dictionary.UNTRAINED)
    )
    counts = dict(zip(Factor, explained_by(truth, Dictionary.TRAINED), strict=True))
    kinds = ", ".join(f"{n} of them {factor}" for factor, n in counts.items() if n)
    raw, concepts = truth.explained[Dictionary.RAW].share, told(truth, Factor.OBJECT)
    text = (
        f"{percent(trained, 0)} % of the living latents tell one known thing from all others"
        + (f" ({kinds})" if kinds else "")
        + f"; in an untrained autoencoder it is {percent(untrained, 0)} %. Of the stream's own dimensions "
        f"it is {percent(raw, 0)} %"
    )
    if np.isfinite(list(concepts.values())).all():
        text += (
            f", and these tell {100 * concepts[Dictionary.RAW]:.0f} % of the concepts, latents "
            f"{100 * concepts[Dictionary.TRAINED]:.0f} %"
        )
    text += "."
    return Lesson(text, "known-truth", 1)


def examples(truth: Truth, atlas: xr.Dataset, described: ImageSet, n: int = 3) -> dict[str, tuple]:
    """Return references of the latents with the highest held-out AUROC, one a factor, n of them."""
    one, rows = truth.explained[Dictionary.TRAINED], {}
    first = clearest(truth, Dictionary.TRAINED, 1)
    first = first[atlas.top_index.values[0, first] >= 0]  # those that fire on the described images
    for latent in first[np.argsort(-one.auroc[first], kind="stable")][:n]:
        factor = FACTORS[truth.levels.factor[one.level[latent]]]
        effect = truth.effects[Dictionary.TRAINED][:, latent]
        title = (
            f"latent {latent}: {factor} “{truth.levels.names[one.level[latent]]}”, AUROC "
            f"{one.auroc[latent]:.2f}; moved most by: {FACTORS[effect.argmax()]} "
            f"({effect.max() / effect.sum():.2f} of all movement)"
        )
        rows[title] = shown(described, atlas.isel(latent=latent).top_index.values)
    return rows
