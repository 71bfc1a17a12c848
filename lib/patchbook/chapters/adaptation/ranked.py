"""Latents ranked by one model, images classified by the other: Fig. 5(c), 6, 15, 16 and 22."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import xarray as xr

from patchbook.chapters.adaptation.tasks import Adaptation, Task, pooled
from patchbook.chapters.opening import pictures, shown
from patchbook.chapters.verdicts_of_models import cohens_d, is_above, no_matter_who_ranks, ratio
from patchbook.figures import Counts
from patchbook.lessons import Lesson, lesson
from patchbook.report import Finding, Verdict, finding
from patchbook.tables import in_percent, percent
from patchsae.adaptation.remapping import compare_counts, correlation
from patchsae.images.sets import ImageSet
from patchsae.latents.atlas import AtlasConfig
from patchsae.masking.rankings import CLASS
from patchsae.masking.sweep import MaskingConfig, curves, sweep
from patchsae.runs.intervals import Interval, bootstrap

SETTINGS = (("CLIP", "CLIP"), ("MaPLe", "CLIP"), ("CLIP", "MaPLe"), ("MaPLe", "MaPLe"))
"""By whom latents are ranked, and who classifies."""
Swept = Mapping[tuple[str, str], xr.Dataset]


def area(found: xr.Dataset) -> np.ndarray:
    """Average the on-curve of each image over all sizes but the last: [N]."""
    on = found["rank"].sel(ranking=CLASS, switch="on").isel(k=slice(0, -1))
    return (on == 0).mean("k").values


@dataclass(frozen=True)
class Ranked:
    """Masking of every data set in all four settings."""

    a: Adaptation
    config: MaskingConfig
    half_images: int
    swept: Mapping[str, Mapping[str, Swept]]
    """By half and data set."""

    def panels(self, half: str) -> dict[str, dict]:
        """Return the curves of a half by data set, for a figure."""
        return {
            self.a.tasks[name].title: {
                pair: curves(found, seed=self.a.run.seed, draws=500) for pair, found in by_pair.items()
            }
            for name, by_pair in self.swept[half].items()
        }

    @property
    def sizes(self) -> list[int]:
        """Return the numbers of latents."""
        return next(iter(self.swept["base"].values()))["CLIP", "CLIP"].k.values.tolist()

    @cached_property
    def changes(self) -> dict[str, dict[str, np.ndarray]]:
        """Return what changes per image if MaPLe classifies, or ranks, instead of CLIP, by half."""
        found: dict[str, dict[str, np.ndarray]] = {"classifies": {}, "ranks": {}}
        for half, by_name in self.swept.items():
            of = {pair: pooled([area(pairs[pair]) for pairs in by_name.values()]) for pair in SETTINGS}
            cc, mc, cm, mm = (of[pair] for pair in SETTINGS)
            found["classifies"][half] = (cm + mm - cc - mc) / 2
            found["ranks"][half] = (mc + mm - cc - cm) / 2
        return found

    def change(self, what: str) -> dict[str, Interval]:
        """Return a change of `changes` averaged over images, with its interval, by half."""
        return {half: bootstrap(values, self.a.run.seed) for half, values in self.changes[what].items()}

    def cases(self, t: Task, n: int = 2) -> np.ndarray:
        """Return up to n masking images, of classes by falling gain, that MaPLe alone gets right."""
        pair = self.swept["base"][t.name]
        ours, other = (pair[p, p].original_rank.values == 0 for p in ("MaPLe", "CLIP"))
        labels, gains = pair["CLIP", "CLIP"].label.values, np.nan_to_num(t.class_gains(), nan=-1)
        where = np.flatnonzero(ours & ~other)
        order = where[np.argsort(-gains[labels[where]], kind="stable")]
        _, first = np.unique(labels[order], return_index=True)
        return order[np.sort(first)][:n]

    def heatmap(self, t: Task, places: np.ndarray) -> tuple:
        """Return what a figure of masked predictions takes, for some masking images."""
        pair, names = self.swept["base"][t.name], np.array(t.halves["base"].part.classnames, dtype=object)
        on = {"ranking": CLASS, "switch": "on"}
        said = [pair[p, p].prediction.sel(on).isel(image=places).values for p in ("CLIP", "MaPLe")]
        said = np.stack(said, 1)
        labels = pair["CLIP", "CLIP"].label.values[places]
        batch = self.a.run.few(t.fresh, self.half_images).load(places)
        return (
            pictures(batch.images), [names[c] for c in labels], names[said],
            said == labels[:, None, None], ["CLIP", "MaPLe"], [f"k = {n:,}" for n in self.sizes],
        )  # fmt: skip

    def same_latents(self, names: Sequence[str]) -> np.ndarray:
        """Return by how much MaPLe is ahead of CLIP with the same top-k latents, per image, mean over k."""
        pairs = [(area(self.swept["base"][n]["CLIP", p]) for p in ("MaPLe", "CLIP")) for n in names]
        return np.concatenate([ours - other for ours, other in pairs])


def rank_and_classify(
    a: Adaptation, sizes: Sequence[int], half_images: int, include_prompt_tokens: bool
) -> Ranked:
    """Mask images that chose nothing, in all four settings, on both halves of every data set."""
    run = a.run
    config = MaskingConfig(
        sizes=tuple(sizes), random=0, seed=run.seed, include_prompt_tokens=include_prompt_tokens
    )
    swept: dict[str, dict] = {"base": {}, "novel": {}}
    for name, t in a.tasks.items():
        models = {"CLIP": run.backbone, "MaPLe": t.model}
        atlases = dict(zip(models, t.atlases, strict=True))
        for half, about in t.halves.items():
            test = run.few(t.fresh, half_images) if half == "base" else about.test
            for ranked, classified in SETTINGS:
                swept[half].setdefault(name, {})[ranked, classified] = sweep(
                    run.sae, models[classified], test, t.texts[classified == "MaPLe"][about.keep],
                    atlases[ranked].isel(klass=about.keep), config, run.root, run.sae_hash, models[ranked],
                )  # fmt: skip
    return Ranked(a, config, half_images, swept)


def fig_15(found: Ranked) -> Finding:
    """Judge that MaPLe classifies better with the same number of latents."""
    change = found.change("classifies")
    return finding(
        "Fig. 15",
        claim="On base classes MaPLe classifies better than CLIP with the same number of latents.",
        quantity="accuracy on top-k, MaPLe minus CLIP classifying, mean over k and images",
        unit="points",
        ours=in_percent(change["base"]),
        rule="the interval lies above 0",
        **is_above(
            change["base"], why=f"On novel classes it is {percent(change['novel'])} points."
        )._asdict(),
        effect=cohens_d(found.changes["classifies"]["base"]),
        effect_name="Cohen's d, paired over images",
    )


def fig_15_lesson(found: Finding) -> Lesson:
    """Say in one sentence what the same number of latents is worth to both models."""
    return lesson(
        found, 3,
        holds="From the same number of latents MaPLe reads more than CLIP on base classes: {} of accuracy, "
        "mean over k.",
        fails="From the same number of latents MaPLe reads less than CLIP on base classes: {} of accuracy, "
        "mean over k.",
        open_="Whether MaPLe reads more than CLIP from the same number of latents is not clear: {} of "
        "accuracy, mean over k.",
    )  # fmt: skip


def fig_16(found: Ranked) -> Finding:
    """Judge that it does not matter which model ranks the latents."""
    by_rank, by_model = found.change("ranks"), found.change("classifies")
    half = max(by_rank, key=lambda half: abs(by_rank[half].value))
    judged = no_matter_who_ranks({half: in_percent(value) for half, value in by_rank.items()}, 2)
    return finding(
        "Fig. 16",
        claim="Which model ranks the latents “does not show significant difference”, base and novel "
        "classes.",
        quantity=f"accuracy on top-k, MaPLe minus CLIP ranking, mean over k and images, {half} classes",
        ours=in_percent(by_rank[half]),
        unit="points",
        rule="the two are equivalent: the intervals for base and for novel classes both lie within a "
        "margin of ±2 points, this book's choice",
        **judged._asdict(),
        effect=ratio(by_rank[half].value, by_model[half].value),
        effect_name="times what it changes which model classifies, on the same images",
    )


def _told(found: Ranked, names: Sequence[str]) -> dict:
    """Return what a finding says of MaPLe's lead with the same latents."""
    change = found.same_latents(names)
    mean = bootstrap(change, found.a.run.seed)
    why = {
        Verdict.OPEN: "With the same latents on, averaged over k, neither model is clearly ahead.",
        Verdict.DIFFERS: "With the same latents on, averaged over k, MaPLe is right clearly less often.",
    }
    weight = {"effect": cohens_d(change), "effect_name": "Cohen's d, paired over images"}
    return {"ours": in_percent(mean)} | is_above(mean, why=why)._asdict() | weight


def fig_6(found: Ranked) -> Finding:
    """Judge that MaPLe names the class from the latents with which CLIP does not."""
    names = found.a.by_gain[:2]
    return finding(
        "Fig. 6",
        claim="Where adaptation gains, MaPLe names the class from the very latents with which CLIP does "
        "not.",
        quantity="accuracy with the same top-k latents, MaPLe minus CLIP, mean over k, "
        + " and ".join(found.a.tasks[name].title for name in names),
        unit="points",
        rule="the interval lies above 0, over images that did not choose the sets",
        **_told(found, names),
    )


def fig_22(found: Ranked) -> Finding:
    """Judge the same on the data sets that come next, where their gain is clear."""
    names = [name for name in found.a.by_gain[2:] if found.a.choosing[False][name].low > 0]
    nothing_follows = {
        "ours": None,
        "verdict": Verdict.OPEN,
        "reason": "data lacking",
        "why": "No third data set has a clear gain.",
    }
    return finding(
        "Fig. 22",
        claim="On further data sets too, MaPLe alone is right with the same few latents.",
        quantity="accuracy with the same top-k latents, MaPLe minus CLIP, mean over k"
        + "".join(f", {found.a.tasks[name].title}" for name in names),
        unit="points",
        rule="the interval lies above 0, over the further data sets with a clear gain and images that did "
        "not choose them",
        **(_told(found, names) if names else nothing_follows),
    )


def further(found: Ranked) -> list[Task]:
    """Return the data sets of Fig. 22: those that come next and gain at all."""
    a = found.a
    return [a.tasks[name] for name in a.by_gain[2:5] if a.choosing[False][name].value > 0]


def scatter_of(found: Ranked, t: Task, place: int) -> tuple[dict[str, Counts], np.ndarray]:
    """Return Fig. 6's scatter for the class of a masking image, and the three latents named in it."""
    c = int(found.swept["base"][t.name]["CLIP", "CLIP"].label.values[place])
    before, after = (counts[c] for counts in t.counts)
    top = np.argsort(-np.minimum(before, after), kind="stable")[:3]
    note = f"r of raw counts = {correlation(before, after):.3f}"
    marked = {int(s): str(s) for s in top}
    counts = Counts(before, after, compare_counts(before, after), note=note, marked=marked)
    return {f"{t.title}: {t.halves['base'].part.classnames[c]}": counts}, top


def references(
    t: Task, latents: Sequence[int], general: xr.Dataset, described: ImageSet, n: int = 5
) -> dict[str, tuple]:
    """Return references of some latents, on the general images and on a data set's own."""
    rows = {}
    for s in latents:
        for label, about, images in (("scenes", general, described), (t.title, t.atlases[0], t.train)):
            rows[f"latent {s}, {label}"] = shown(images, about.top_index.values[:n, s])
    return rows


def describe_general(a: Adaptation, images: int) -> tuple[xr.Dataset, ImageSet]:
    """Describe latents on the general training images, for the references of Fig. 6."""
    described = a.run.sets.train.sample(images, a.run.seed)
    config = AtlasConfig(tau=a.settings.tau, k=10, empty_classes=True)
    return a.run.atlas(described, config), described
