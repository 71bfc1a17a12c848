"""Which latents leave the diagonal: Fig. 7, 17, 18, 19, 20 and 21."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from sklearn.metrics import confusion_matrix

from patchbook.chapters.adaptation.accuracy import REGIONS
from patchbook.chapters.adaptation.tasks import Adaptation, Task, answers, in_words
from patchbook.chapters.opening import pictures, shown
from patchbook.chapters.published import TABLE_1
from patchbook.chapters.verdicts_of_models import (
    ONE_SET,
    all_of,
    cohens_d,
    far_and_gaining,
    is_above,
    is_within,
    lowest_correlation,
    most_by_far,
    over_classes,
    ratio,
)
from patchbook.figures import Counts, Shown
from patchbook.report import Finding, Verdict, finding
from patchbook.tables import in_percent
from patchsae.adaptation.remapping import LOWER, UPPER, Reading, compare_counts, correlation
from patchsae.latents.maps import masked_images
from patchsae.runs.intervals import Interval, bootstrap, share_of_gain


def regions(a: Adaptation) -> dict[str, Counts]:
    """Return Fig. 17: the regions of the class with the largest gain, in the set with the largest."""
    t = a.lead
    best = int(np.nanargmax(t.class_gains()))
    before, after = (counts[best] for counts in t.counts)
    pooled, panels = -np.sort(-np.concatenate([before, after])), {}
    for reading in Reading:
        groups = compare_counts(before, after, reading)
        note = ", ".join(f"{n.replace('_', '-')} {m.sum()}" for n, m in groups._asdict().items())
        bounds = (pooled[UPPER - 1], pooled[LOWER - 1]) if reading is Reading.VALUE else None
        title = f"{t.title}: {t.halves['base'].part.classnames[best]}, by {reading}"
        panels[title] = Counts(before, after, groups, bounds, note)
    return panels


def fig_7(a: Adaptation) -> Finding:
    """Judge Fig. 7 on the data set with the largest gain."""
    sizes, eurosat = a.lead.sizes, TABLE_1["eurosat"]
    change = sizes["low_to_high"] - sizes["high_to_low"]
    shift = bootstrap(change, a.run.seed)
    why = f"Per base class {in_words({g: v.mean() for g, v in sizes.items()})}; {len(change)} classes."
    return finding(
        "Fig. 7",
        claim="On EuroSAT, far from CLIP's training images, more latents are low-to-high than high-to-low.",
        quantity=f"low-to-high minus high-to-low latents per base class, {a.lead.title}",
        paper=eurosat.low_to_high[0] - eurosat.high_to_low[0],
        ours=shift,
        unit="latents",
        rule="the interval over classes lies above 0",
        effect=cohens_d(change),
        effect_name="Cohen's d, paired over classes",
        **over_classes(is_above(shift, why=why))._asdict(),
    )


def fig_17(a: Adaptation) -> Finding:
    """Judge that latents are rarely off the diagonal."""
    sums = {g: np.array([t.sizes[g].mean() for t in a.tasks.values()]) for g in REGIONS}
    off, every = sums["high_to_low"] + sums["low_to_high"], sum(sums.values())
    # a ratio of means over data sets is a share of a gain that starts at nothing
    share = share_of_gain(np.zeros(len(every)), every, off, a.run.seed)
    theirs = [(row.high[0], row.high_to_low[0] + row.low_to_high[0]) for row in a.published.values()]
    printed = 100 * sum(o for _, o in theirs) / sum(h + o for h, o in theirs)
    open_ = {Verdict.OPEN: "A quarter or more may be off the diagonal."}
    return finding(
        "Fig. 17",
        claim="Latents fall into high, high-to-low and low-to-high, and are rarely off the diagonal.",
        quantity="latents off the diagonal, share of the three groups, mean of data sets, base classes",
        unit="%",
        paper=printed,
        rule="the interval over data sets lies below 25 %",
        **a.of_sets(in_percent(share), is_within(share, 0.25, why=open_)),
        effect=ratio(100 * share.value, printed) if np.isfinite(share.value) else None,
        effect_name="times the share in the paper's Table 1",
    )


def totals(a: Adaptation) -> dict[str, Counts]:
    """Return Fig. 20: the counts of every data set over its base classes."""
    panels = {}
    for t in a.tasks.values():
        both = [counts.sum(0) for counts in t.base_counts]
        panels[t.title] = Counts(*both, note=f"r of raw counts = {correlation(*both):.3f}")
    return panels


def correlations(a: Adaptation) -> dict[str, float]:
    """Return the correlation of counts of each data set, by title."""
    return {t.title: correlation(*(counts.sum(0) for counts in t.base_counts)) for t in a.tasks.values()}


def fig_20(a: Adaptation) -> Finding:
    """Judge that counts before and after adaptation are alike, least so on the stranger's set."""
    mean = bootstrap(np.array(list(correlations(a).values())), a.run.seed)
    pairs = {t.title: t.base_counts for t in a.tasks.values()}
    least = lowest_correlation(pairs, a.stranger, a.run.seed)
    why = f"{least.judged.why} The largest gain in accuracy is on {a.lead.title}."
    return finding(
        "Fig. 20",
        claim="Counts before and after adaptation are highly correlated, least so on EuroSAT.",
        quantity="correlation of counts, mean of data sets",
        rule="the interval over data sets lies above 0.9, and that of the lowest other correlation minus "
        f"the one of {a.stranger_words} (as many classes of each, resampled) above 0",
        **a.of_sets(mean, over_classes(all_of(is_above(mean, 0.9), least.judged._replace(why=why)))),
        effect=least.effect,
        effect_name="Cohen's q: the gap to the next lowest correlation",
    )


def by_change(a: Adaptation) -> list[Task]:
    """Sort data sets by their latents off the diagonal per base class, the most first."""
    return sorted(a.tasks.values(), key=lambda t: -t.off_diagonal.mean())


def cases(a: Adaptation, t: Task) -> list[Shown]:
    """Return Fig. 18 and 19 of a data set: of each region the latent that changes most, on one image."""
    c = int(t.off_diagonal.argmax())
    before, after = (counts[c] for counts in t.counts)
    image = t.train.load([int(np.flatnonzero(t.train.labels == c)[0])]).images
    rank = {"high": np.minimum(before, after), "high_to_low": before - after, "low_to_high": after - before}
    rows = []
    for group, members in compare_counts(before, after)._asdict().items():
        if not members.any():
            continue
        s = int(np.where(members, rank[group], -1).argmax())
        masks = [masked_images(a.run.sae, m, image, s)[0] for m in (a.run.backbone, t.model)]
        about = t.atlases[group == "low_to_high"]
        title = (
            f"{t.title}, {t.halves['base'].part.classnames[c]}: {group.replace('_', '-')} "
            f"({members.sum()}), latent {s}, counts {before[s]} and {after[s]}"
        )
        found = shown(t.train, about.top_index.values[:, s])
        rows.append(Shown(title, [pictures(image)[0], *masks], *found))
    return rows


def fig_18(a: Adaptation) -> Finding:
    """Judge that the stranger's set has the most low-to-high latents by far and gains much."""
    risen = {t.title: t.sizes["low_to_high"] for t in a.tasks.values()}
    far = most_by_far(risen, a.stranger, factor=2, seed=a.run.seed)
    gained = [a.tasks[name].title for name in a.by_gain]
    place = 1 + gained.index(a.stranger) if a.stranger else 0
    printed = sorted((row.low_to_high[0] for row in TABLE_1.values()), reverse=True)
    return finding(
        "Fig. 18",
        claim="EuroSAT has the most low-to-high latents by far, and one of the two largest gains.",
        quantity=f"low-to-high latents per base class, {a.stranger_words}, minus twice those of the next",
        unit="latents",
        paper=printed[0] - 2 * printed[1],
        ours=far.found,
        rule="the interval over classes lies above 0 (by far: more than twice the next, asked anew in each "
        "resample) and the data set is among the two with the largest gain",
        **far_and_gaining(far, a.stranger, place, len(gained))._asdict(),
        effect=far.effect,
        effect_name=f"times the next; {printed[0] / printed[1]:.1f} in the paper",
    )


def fig_19(a: Adaptation) -> Finding:
    """Judge that other data sets have some latents off the diagonal too."""
    second = by_change(a)[1] if len(a.tasks) > 1 else None
    found, effect, judged = None, None, ONE_SET
    if second:
        found = bootstrap(second.off_diagonal, a.run.seed)
        judged = over_classes(is_above(found, 0.1, why={Verdict.DIFFERS: "Hardly any are."}))
        effect = ratio(second.off_diagonal.mean(), sum(v.mean() for v in second.sizes.values()))
    dtd = TABLE_1["dtd"]
    return finding(
        "Fig. 19",
        claim="Other data sets have some latents off the diagonal too.",
        quantity="latents off the diagonal per base class, data set with the second most"
        + (f", {second.title}" if second else "")
        + " (the paper's: DTD)",
        paper=dtd.high_to_low[0] + dtd.low_to_high[0],
        ours=found,
        unit="latents",
        rule="the interval over classes lies above 0.1, below which the paper greys numbers out",
        **judged._asdict(),
        effect=effect,
        effect_name="of the three groups' latents",
    )


class Confusion(NamedTuple):
    """Fig. 21: what both models answer on base classes of one data set."""

    title: str
    tables: list[np.ndarray]
    """Of CLIP and MaPLe, in shares of the true class [C, C]."""
    names: list[str]
    by_class: np.ndarray
    """Gain of each class with a test image, in points."""
    there: np.ndarray
    """Which classes these are."""

    def largest(self, n: int = 20) -> tuple[list[np.ndarray], list[str]]:
        """Return the tables of the n classes with the largest change, and their names."""
        kept = np.sort(self.there[np.argsort(-np.abs(self.by_class), kind="stable")[:n]])
        return [table[np.ix_(kept, kept)] for table in self.tables], [self.names[c] for c in kept]


def confusion(a: Adaptation, images: int) -> Confusion:
    """Answer images that chose nothing, of the set with the largest gain among those with ten classes."""
    wide = [n for n in a.by_gain if len(a.tasks[n].halves["base"].part.classnames) >= 10] or a.by_gain
    t = a.tasks[wide[0]]
    about, test = t.halves["base"], a.run.few(t.fresh, images)
    said = [
        answers(a.run, m, test, text[about.keep])[0]
        for m, text in zip((a.run.backbone, t.model), t.texts, strict=True)
    ]
    names = about.part.classnames
    there = np.unique(test.labels)  # a class without a test image has no accuracy that could change
    tables = [
        confusion_matrix(test.labels, answer, labels=range(len(names)), normalize="true") for answer in said
    ]
    by_class = 100 * (tables[1].diagonal() - tables[0].diagonal())[there]
    return Confusion(t.title, tables, names, by_class, there)


def fig_21(found: Confusion, seed: int) -> Finding:
    """Judge that answers move to the diagonal of the confusion matrix."""
    gains, flowers = found.by_class, TABLE_1["oxford_flowers"]
    change: Interval = bootstrap(gains, seed)
    largest = np.argsort(-gains, kind="stable")[:3]
    most = ", ".join(f"{found.names[found.there[c]]} ({gains[c]:+.0f})" for c in largest)
    why = f"The most is gained by {most}; {(gains < 0).sum()} of {len(gains)} classes lose."
    return finding(
        "Fig. 21",
        claim="Adaptation moves the answers to the diagonal of the confusion matrix.",
        quantity=f"gain in accuracy of a base class, {found.title} (the paper's: Flowers102, Table 1)",
        paper=flowers.maple[0] - flowers.clip[0],
        ours=change,
        unit="points",
        rule="the interval over classes lies above 0, on images that did not choose the set",
        effect=cohens_d(gains),
        effect_name="Cohen's d, paired over classes",
        **over_classes(is_above(change, why=why))._asdict(),
    )
