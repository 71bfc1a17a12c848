"""How the notebooks' findings are judged: verdict, kind of reason, sentence, and what a result weighs.

Every rule is a function, so that a case that must fail can be shown to fail, as its tests do.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from patchbook.report import Reason, Verdict, above, within
from patchsae.adaptation.remapping import correlation
from patchsae.runs.errors import PatchSAEError
from patchsae.runs.intervals import Interval, bootstrap


class Judged(NamedTuple):
    """What is said of a finding; `**judged._asdict()` hands it to `finding` or `beyond`."""

    verdict: Verdict
    reason: Reason | None
    """None where the statement holds."""
    why: str


HOLDS = Judged(Verdict.REPRODUCED, None, "")
ONE_SET = Judged(
    Verdict.OPEN, Reason.LACKING, "One data set alone was run: an interval over data sets needs two."
)


def reason_above(found: Interval | None, bound: float = 0.0) -> Reason | None:
    """Say in a word why something is not above a bound: None where it is, 'data lacking' of nothing."""
    if found is None:
        return Reason.LACKING
    below = Reason.ABSENT if bound > 0 else Reason.REVERSED
    return {Verdict.REPRODUCED: None, Verdict.DIFFERS: below, Verdict.OPEN: Reason.FEW}[above(found, bound)]


def reason_within(found: Interval | None, margin: float) -> Reason | None:
    """Say in a word why something is not within a margin: None where it is, 'data lacking' of nothing."""
    if found is None:
        return Reason.LACKING
    kinds = {Verdict.REPRODUCED: None, Verdict.DIFFERS: Reason.PRESENT, Verdict.OPEN: Reason.FEW}
    return kinds[within(found, margin)]


def is_above(found: Interval, bound: float = 0.0, why: Mapping[Verdict, str] | str = "") -> Judged:
    """Judge by its interval that something is above a bound.

    `why` is one sentence or one by verdict; where there is none and one is needed, a general one is given.
    """
    verdict = above(found, bound)
    general = {
        Verdict.DIFFERS: f"The whole interval lies below {bound:g}.",
        Verdict.OPEN: f"The interval holds {bound:g}.",
    }
    return Judged(verdict, reason_above(found, bound), _sentence(why, verdict) or general.get(verdict, ""))


def is_within(found: Interval, margin: float, why: Mapping[Verdict, str] | str = "") -> Judged:
    """Judge by its 95 % interval that something is equivalent to nothing: within a margin either way."""
    verdict = within(found, margin)
    general = {
        Verdict.DIFFERS: f"The whole interval lies beyond the margin of {margin:g}.",
        Verdict.OPEN: f"The interval reaches across the margin of {margin:g}.",
    }
    return Judged(
        verdict, reason_within(found, margin), _sentence(why, verdict) or general.get(verdict, "")
    )


def _sentence(why: Mapping[Verdict, str] | str, verdict: Verdict) -> str:
    return why if isinstance(why, str) else why.get(verdict, "")


def over_classes(judged: Judged) -> Judged:
    """Say that classes are too few where the interval of a judgement is one over classes or data sets."""
    return judged._replace(reason=Reason.FEW_CLASSES) if judged.reason is Reason.FEW else judged


def all_of(*parts: Judged) -> Judged:
    """Judge a statement of several parts: it holds if all do, and differs if one does.

    The reason is that of the first part with the verdict; `why` joins what the parts that do not hold say,
    or, where all hold, what they add.
    """
    if not parts:
        raise PatchSAEError("A statement without parts cannot be judged: give at least one.")
    order = (Verdict.DIFFERS, Verdict.OPEN, Verdict.PAPER_SCALE, Verdict.REPRODUCED)
    worst = min(parts, key=lambda part: order.index(part.verdict))
    missed = [part for part in parts if part.verdict is not Verdict.REPRODUCED] or parts
    return Judged(worst.verdict, worst.reason, " ".join(part.why for part in missed if part.why))


def cohens_d(values: np.ndarray, others: np.ndarray | None = None) -> float | None:
    """Return Cohen's d of paired differences [N], or of two groups [N], [M] by their pooled sd.

    None where there is no spread to divide by. Refuses NaN.
    """
    groups = [np.asarray(group, np.float64) for group in (values, others) if group is not None]
    if any(np.isnan(group).any() for group in groups):
        raise PatchSAEError("Cohen's d of values that hold NaN is none: leave those out first.")
    free = sum(len(group) - 1 for group in groups)
    if free < 1 or not all(map(len, groups)):
        return None
    spread = math.sqrt(sum(((group - group.mean()) ** 2).sum() for group in groups) / free)
    gap = groups[0].mean() - (groups[1].mean() if len(groups) > 1 else 0.0)
    return float(gap / spread) if spread > 1e-12 * max(1.0, abs(gap)) else None


def cohens_h(share: float, other: float) -> float:
    """Return Cohen's h of two shares in 0 … 1: the difference of their arcsine transforms."""
    if not (0 <= share <= 1 and 0 <= other <= 1):
        raise PatchSAEError(f"Cohen's h compares shares in 0 … 1; got {share} and {other}.")
    return 2 * math.asin(math.sqrt(share)) - 2 * math.asin(math.sqrt(other))


def ratio(value: float, other: float) -> float | None:
    """Return how many times `other` a value is; None where `other` is 0. Refuses NaN."""
    if math.isnan(value) or math.isnan(other):
        raise PatchSAEError(f"A ratio of {value} and {other} is none: leave NaN out first.")
    return float(value / other) if other else None


def difference_of_means(
    values: np.ndarray, others: np.ndarray, seed: int = 0, draws: int = 2000
) -> Interval:
    """Return the mean of `values` [N] minus that of `others` [M], both resampled, with a 95 % interval."""
    one, two = np.asarray(values, np.float64), np.asarray(others, np.float64)
    if not len(one) or not len(two) or np.isnan(one).any() or np.isnan(two).any():
        raise PatchSAEError("A difference of means needs two groups with numbers and no NaN.")
    rng = np.random.default_rng(seed)
    drawn = _means(one, rng, draws) - _means(two, rng, draws)
    return Interval(float(one.mean() - two.mean()), *map(float, np.quantile(drawn, (0.025, 0.975))))


def _means(values: np.ndarray, rng: np.random.Generator, draws: int) -> np.ndarray:
    n = len(values)
    return np.array([values[rng.integers(n, size=n)].mean() for _ in range(draws)])


NOTHING = Interval(math.nan, math.nan, math.nan)


class Lead(NamedTuple):
    """By how much one data set is ahead of the next."""

    found: Interval
    """What the rule asks to lie above 0."""
    next: str
    """The data set that comes nearest."""
    effect: float | None
    judged: Judged


def most_by_far(
    groups: Mapping[str, np.ndarray],
    name: str | None,
    factor: float = 2.0,
    seed: int = 0,
    draws: int = 2000,
) -> Lead:
    """Judge that one group has the largest mean by far: more than `factor` times any other's.

    `groups` hold one number per class each. The interval is that of the group's mean minus `factor` times
    the largest other mean; classes are resampled in every group, and which other group is the largest is
    asked anew in each resample. The effect is the ratio to the largest other mean. Nothing is decided
    where the group is not there (its name may be None) or is alone. Refuses NaN.
    """
    if lacking := _nothing_beside(groups, name):
        return lacking
    others = [other for other in groups if other != name]
    if any(not len(values) or np.isnan(values).any() for values in groups.values()):
        raise PatchSAEError("Each data set needs classes, and none of their numbers may be NaN.")
    rng = np.random.default_rng(seed)
    drawn = {key: _means(np.asarray(values, np.float64), rng, draws) for key, values in groups.items()}
    means = {key: float(np.mean(values)) for key, values in groups.items()}
    second = max(others, key=means.get)
    bounds = np.quantile(
        drawn[name] - factor * np.max([drawn[other] for other in others], axis=0), (0.025, 0.975)
    )
    found = Interval(means[name] - factor * means[second], *map(float, bounds))
    verdict = above(found)
    behind = means[name] < means[second]
    reasons = {
        Verdict.REPRODUCED: None,
        Verdict.OPEN: Reason.FEW_CLASSES,
        Verdict.DIFFERS: Reason.REVERSED if behind else Reason.ABSENT,
    }
    why = (
        f"{name} has {means[name]:.2f} per class, {second} {means[second]:.2f}"
        f"{': more, not less' if behind else ''}; by far is more than {factor:g} times the next."
    )
    return Lead(found, second, ratio(means[name], means[second]), Judged(verdict, reasons[verdict], why))


def correlation_draws(
    before: np.ndarray,
    after: np.ndarray,
    seed: int = 0,
    draws: int = 1000,
    distinct: int | None = None,
) -> np.ndarray:
    """Return the correlation of counts summed over classes drawn at random: float64 [draws].

    `before`, `after`: counts [classes, latents]. Classes are resampled as in a bootstrap, or `distinct` of
    them drawn without one coming twice. Pearson's, over the latents that fire in either model, as in
    `remapping.correlation`; NaN where there is none.
    """
    rng, classes = np.random.default_rng(seed), len(before)
    fires = (before.sum(0) > 0) | (after.sum(0) > 0)
    one, two = (counts[:, fires].astype(np.float64) for counts in (before, after))
    found = np.empty(draws)
    for draw in range(draws):
        picked = (
            rng.integers(classes, size=classes) if distinct is None else rng.permutation(classes)[:distinct]
        )
        weight = np.bincount(picked, minlength=classes).astype(np.float64)
        found[draw] = correlation(weight @ one, weight @ two)
    return found


def lowest_correlation(
    counts: Mapping[str, tuple[np.ndarray, np.ndarray]], name: str | None, seed: int = 0, draws: int = 1000
) -> Lead:
    """Judge that one data set has the lowest correlation of counts before and after adaptation.

    `counts` of each set: [classes, latents] before and after. Counts of fewer classes are noisier and so
    correlate less: each set is taken with as many classes as the smallest has, as the median over such
    draws. The interval is that of the lowest other correlation minus the set's own; its spread comes from
    resampling all classes of every set, and which other set is the lowest is asked anew each time. The
    effect is Cohen's q, the difference of Fisher's z. Nothing is decided where the set is not there or
    alone, or where counts have no correlation.
    """
    if lacking := _nothing_beside(counts, name):
        return lacking
    others = [other for other in counts if other != name]
    fewest = min(len(before) for before, _ in counts.values())
    found, drawn = {}, {}
    for at, (key, (before, after)) in enumerate(counts.items()):
        alike = correlation_draws(before, after, seed + at, draws if len(before) > fewest else 1, fewest)
        resampled = correlation_draws(before, after, seed + at, draws)
        defined = np.isfinite(alike).all() and np.isfinite(resampled).any()
        found[key] = float(np.median(alike)) if defined else math.nan
        # a resample holds fewer different classes, which moves r: only its spread is used
        drawn[key] = resampled - np.nanmedian(resampled) + found[key] if defined else resampled
    if undefined := [key for key in counts if math.isnan(found[key])]:
        why = f"The counts of {', '.join(undefined)} are too few or all alike: they have no correlation."
        return Lead(NOTHING, "", None, Judged(Verdict.OPEN, Reason.LACKING, why))
    second = min(others, key=found.get)
    gap = np.min([drawn[other] for other in others], axis=0) - drawn[name]
    bounds = np.quantile(gap[np.isfinite(gap)], (0.025, 0.975))
    lead = Interval(found[second] - found[name], *map(float, bounds))
    judged = is_above(
        lead,
        why=f"With {fewest} classes of each, {name} has r = {found[name]:.3f} and the lowest other is "
        f"{found[second]:.3f} on {second} (difference {_told(lead, 3)}).",
    )
    clear = all(abs(found[key]) < 1 for key in (name, second))
    q = math.atanh(found[second]) - math.atanh(found[name]) if clear else None
    return Lead(lead, second, q, judged)


def _nothing_beside(groups: Mapping[str, object], name: str | None) -> Lead | None:
    """Return what is said where the data set, or any other to compare it with, is not in a run."""
    if name in groups and len(groups) > 1:
        return None
    missing = f"'{name}' alone was run" if name in groups else "The data set in EuroSAT's part was not run"
    judged = Judged(Verdict.OPEN, Reason.LACKING, f"{missing}: there is nothing to compare.")
    return Lead(NOTHING, "", None, judged)


def better_and_high(gain: Interval, sizes: Mapping[str, float]) -> Judged:
    """Judge Table 1: a gain above 0, and more latents per class high in both models than off the diagonal.

    `sizes`: mean number of latents per class by group: high, high_to_low, low_to_high.
    """
    stay = sizes["high"] > sizes["high_to_low"] + sizes["low_to_high"]
    moved = Judged(Verdict.DIFFERS, Reason.REVERSED, "No fewer latents leave the diagonal than stay on it.")
    return all_of(is_above(gain), HOLDS if stay else moved)


def far_and_gaining(lead: Lead, name: str | None, place: int, of: int) -> Judged:
    """Judge Fig. 18: the most low-to-high latents by far, and one of the two largest gains of all sets."""
    if lead.judged.reason is Reason.LACKING:
        return lead.judged
    gains = Judged(
        Verdict.REPRODUCED if place <= 2 else Verdict.DIFFERS,
        None if place <= 2 else Reason.ABSENT,
        f"{name} has gain number {place} of {of}.",
    )
    return all_of(lead.judged, gains)


def no_matter_who_ranks(by_rank: Mapping[str, Interval], margin: float) -> Judged:
    """Judge Fig. 16: which model ranks makes no difference beyond a margin, in each half of the classes.

    `by_rank`: difference in accuracy by half, in the unit of the margin. The sentence says too where an
    interval excludes 0: there is then a difference, and the claim is about its size.
    """
    judged = all_of(*(is_within(found, margin) for found in by_rank.values()))
    seen = [half for half, found in by_rank.items() if found.low > 0 or found.high < 0]
    told = [f"{half} {_told(found)}" for half, found in by_rank.items()]
    why = f"By half of the classes: {', '.join(told)} points."
    if seen:
        why += (
            f" On {' and '.join(seen)} classes the interval excludes 0: there is a difference, and the "
            f"statement is about its size, at most {margin:g} points. The paper prints no number here."
        )
    return judged._replace(why=why)


def masks_tell(
    nothing: Interval, chance: float, class_ahead: Sequence[bool], others: Sequence[Interval], margin: float
) -> Judged:
    """Judge Fig. 5: nothing left without latents, class-level ones matter, dataset-level ones do not.

    Parameters
    ----------
    nothing, chance : accuracy with all latents off, and by guessing, 0 … 1
    class_ahead : whether class-level latents are clearly ahead of random ones, on and off
    others : dataset-level minus random latents at each number of latents, 0 … 1
    margin : within which `others` count as little, 0 … 1
    """
    parts = [HOLDS, HOLDS, all_of(*(is_within(found, margin) for found in others))]
    if not nothing.low <= chance <= nothing.high:
        parts[0] = Judged(
            Verdict.DIFFERS,
            Reason.PRESENT,
            f"All latents off leave {_percent(nothing, 2)} % where chance is {100 * chance:.2f} %.",
        )
    if not all(class_ahead):
        parts[1] = Judged(
            Verdict.DIFFERS, Reason.ABSENT, "Class-level latents are not clearly ahead of random ones."
        )
    if parts[2].verdict is not Verdict.REPRODUCED:
        largest = max(others, key=lambda found: abs(found.value))
        clearly = "clearly " if parts[2].verdict is Verdict.OPEN else ""
        parts[2] = parts[2]._replace(
            why=f"Dataset-level latents change accuracy by up to {_percent(largest)} points against random "
            f"ones, which is not {clearly}within {100 * margin:g} points."
        )
    return all_of(*parts)


def _percent(found: Interval, digits: int = 1) -> str:
    return _told(Interval(*(100 * v for v in found)), digits)


def _told(found: Interval, digits: int = 1) -> str:
    return "{:.{d}f} [{:.{d}f}, {:.{d}f}]".format(*found, d=digits).replace("-", "−")


class Unseen(NamedTuple):
    """What never having been seen has to do with a gain."""

    found: Interval
    """Gain of what was never seen minus that of what was seen, in points."""
    effect: float | None
    judged: Judged


def unseen_gains_more(seen: np.ndarray, unseen: np.ndarray, seed: int = 0) -> Unseen:
    """Judge that adaptation gains more on (concept, style) pairs that the model never saw in training.

    `seen`, `unseen`: the gain per image, -1, 0 or 1. The effect is Cohen's d of the two groups. Without
    images of both kinds nothing can be told.
    """
    if not len(seen) or not len(unseen):
        lacking = Judged(
            Verdict.OPEN,
            Reason.LACKING,
            "There are no images of one of the two kinds of pairs in this run.",
        )
        return Unseen(NOTHING, None, lacking)
    found = difference_of_means(100 * np.asarray(unseen), 100 * np.asarray(seen), seed)
    parts = [bootstrap(np.asarray(of, np.float64), seed) for of in (unseen, seen)]
    why = (
        f"Pairs never seen gain {_percent(parts[0])} points ({len(unseen):,} images), pairs seen in "
        f"training {_percent(parts[1])} ({len(seen):,})."
    )
    return Unseen(found, cohens_d(unseen, seen), is_above(found, why=why))
