"""The verdicts of chapters 1 to 3 and 6: what a run measured, in; verdict, reason and sentence, out.

What `verdicts_of_models` has for the chapters on masking and adaptation, this has for the rest; each rule
has a case that must fail in tests/test_verdicts_of_latents.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from patchbook.chapters.verdicts_of_models import Judged, cohens_d, is_above
from patchbook.report import Reason, Verdict
from patchbook.tables import fixed
from patchsae.runs.intervals import Interval, bootstrap, rank_correlation, wilson

NO_MASKS = "These images have no object masks; the embedded scenes have."


class Found(NamedTuple):
    """What a finding says: `ours`, `verdict`, `reason`, `why` and `effect` of `finding`."""

    ours: Interval | float | None
    judged: Judged
    effect: float | None = None

    def told(self) -> dict[str, object]:
        """Return the parameters of `finding`."""
        return {"ours": self.ours, "effect": self.effect} | self.judged._asdict()


def lacking(why: str) -> Found:
    """Say that a run has not what a rule asks about."""
    return Found(None, Judged(Verdict.OPEN, Reason.LACKING, why))


def points_better(best: np.ndarray, untrained: np.ndarray, area: np.ndarray, seed: int = 0) -> Found:
    """Judge Fig. 2: the best latent points better than the area of the object, and than a random SAE's.

    Each [N], 0 or 1 (or an expectation), on the same scenes. Where it does not beat the area, the map does
    not show where the object is, and the rest is not asked.
    """
    by_chance = bootstrap(100 * (best - area), seed)
    lead = bootstrap(100 * (best - untrained), seed)
    effect = cohens_d(best - untrained)
    if by_chance.low <= 0:
        why = "It is not clearly ahead of the object's area, so the map does not show where the object is."
        return Found(lead, Judged(Verdict.DIFFERS, Reason.CHANCE, why), effect)
    ahead = f"It is {by_chance.value:.0f} points ahead of the object's area, but "
    why = {
        Verdict.OPEN: f"{ahead}whether it points better than the best latent of a random SAE cannot be "
        "told: such masks may be a property of the tokens.",
        Verdict.DIFFERS: f"{ahead}the best latent of a random SAE points better: good masks are a property "
        "of the tokens and do not show that training found a concept.",
    }
    return Found(lead, is_above(lead, why=why), effect)


def in_two_clusters(frequency: np.ndarray, activation: np.ndarray, seed: int = 0) -> Found:
    """Judge Fig. 3: frequent latents are strong, and latents part into clusters along that diagonal.

    `frequency`, `activation`: of the latents that fire, [S]. Clusters are peaks of the density along the
    diagonal that stand out by a tenth of the highest.
    """
    from scipy.signal import find_peaks
    from scipy.stats import gaussian_kde

    logs = [np.log10(values) for values in (frequency, activation)]
    if min(values.std() for values in logs) == 0:
        return lacking("All latents are equally frequent or equally strong.")
    together = rank_correlation(*logs, seed)
    along = sum((values - values.mean()) / values.std() for values in logs)
    density = gaussian_kde(along)(np.linspace(along.min(), along.max(), 200))
    peaks = len(find_peaks(np.pad(density, 1), prominence=0.1 * density.max())[0])
    many = peaks > 1
    why = f"Along the diagonal the density has {peaks} peak{'s' * (peaks != 1)}" + (
        "." if many else ": one elongated cloud, not clusters."
    )
    judged = is_above(together, why=why) if many else Judged(Verdict.DIFFERS, Reason.ABSENT, why)
    return Found(together, judged, together.value**2)


def consistent_elsewhere(observed: np.ndarray, null: np.ndarray, seed: int = 0) -> Found:
    """Judge Fig. 10: references on other data sets share a label more often than labels dealt at random.

    `observed`, `null` [data sets, latents]: share of the commonest label, NaN where a latent has not all of
    its references. A latent is one draw, on however many data sets it has them.
    """
    asked = np.isfinite(observed).any(0)
    if not asked.any():
        return lacking("There is no other data set on which latents have all references.")
    observed, null = (100 * np.nanmean(values[:, asked], 0) for values in (observed, null))
    purer = bootstrap(observed - null, seed)
    why = (
        f"On average {observed.mean():.1f} % of a latent's references there carry one label, "
        f"{null.mean():.1f} % if labels are dealt at random. Latents above τ on more than half of the "
        "images are left out."
    )
    return Found(purer, is_above(purer, why=why), float(observed.mean() / null.mean()))


def at_home(own: np.ndarray, fresh: np.ndarray, titles: Sequence[str]) -> Found:
    """Judge Fig. 14: each data set is, on other images too, the one where its latent is most frequent.

    `own` [D]: whether it is; `fresh` [D]: whether the data set had enough other images to be asked.
    """
    asked = np.flatnonzero(fresh) if len(own) > 1 else np.array([], int)
    if not len(asked):
        return lacking("There are no other images, or no other data sets.")
    chance = 100 / len(own)
    # a bootstrap of a few hits that all agree has no width
    hit = Interval(*(float(100 * v) for v in wilson(own[asked].sum(), len(asked))))
    missed = ", ".join(titles[i] for i in asked if not own[i])
    why = f"Chance is {chance:.0f} %." + (
        f" Another data set has more of the latent of: {missed}." if missed else ""
    )
    return Found(hit, is_above(hit, chance, why=why), hit.value / chance)


def shared_across(same: np.ndarray, other: np.ndarray, seed: int = 0) -> Found:
    """Judge Fig. 4: two drawings of one class share more latents than drawings of two classes, [C] each."""
    gap = bootstrap(same - other, seed)
    unclear = "Whether two drawings of one thing share more is not clear."
    why = {Verdict.OPEN: unclear, Verdict.DIFFERS: unclear}
    return Found(gap, is_above(gap, why=why), cohens_d(same - other))


def richer_deeper(
    ahead: Sequence[np.ndarray], activation: Sequence[float], relative: Sequence[float], seed: int = 0
) -> Found:
    """Judge Fig. 9: from the first block to the last latents get better, and more active.

    Parameters
    ----------
    ahead : by block, AP of the best latent of each class minus that of a random SAE, per scene [N]
    activation, relative : by block, mean activation, and the same over the length of a token
    """
    change = ahead[-1] - ahead[0]
    deeper = bootstrap(change, seed)
    gaps = ", ".join(fixed(float(gap.mean()), 2, sign=True) for gap in ahead)
    why = f"Block by block the AP minus the random SAE's is {gaps}."
    if relative[-1] <= relative[0]:
        why += " Relative to the length of a token, activations are not higher in deeper blocks."
    if activation[-1] <= activation[0]:
        judged = Judged(Verdict.DIFFERS, Reason.REVERSED, why)
    else:
        judged = is_above(deeper, why=why)
    return Found(deeper, judged, cohens_d(change))


def reads_and_sees(n: int, null: np.ndarray, read: Interval, words: int) -> Found:
    """Judge Fig. 13: more latents read a word and see its thing than if words were dealt at random.

    Parameters
    ----------
    n, null : pairs of latent and concept, and how many there are in each random deal
    read : zero-shot accuracy of the model on the written words, 0 … 1
    words : how many there are
    """
    expected, reads = float(null.mean()), read.low > 1 / words
    effect = float((n - expected) / null.std()) if null.std() else None
    if p_of(n, null) < 0.05:
        return Found(n - expected, Judged(Verdict.REPRODUCED, None, ""), effect)
    why = (
        f"{n} pairs, {expected:.2f} expected by chance. The model itself reads {100 * read.value:.1f} % of "
        f"the words (chance {100 / words:.1f} %)."
    )
    # a model that cannot read has nothing for a latent to find
    verdict, reason = (Verdict.DIFFERS, Reason.ABSENT) if reads else (Verdict.PAPER_SCALE, Reason.WEAK)
    return Found(n - expected, Judged(verdict, reason, why), effect)


def p_of(n: int, null: np.ndarray) -> float:
    """Return the probability of at least n under a null of random draws."""
    return float((1 + (null >= n).sum()) / (1 + len(null)))


def same_directions(agree: Mapping[tuple[str, str], bool], full_budget: bool, seed: int = 0) -> Found:
    """Judge Table 2: the changes that are larger than the seed's go the paper's way.

    `agree`: by (row, quantity), whether it does. Short runs are shown and decide nothing.
    """
    against = [f"{title} of '{name}'" for (name, title), same in agree.items() if not same]
    why = f"Against the paper: {', '.join(against)}." if against else "Nothing goes against the paper."
    votes = bootstrap(100.0 * np.array(list(agree.values())), seed) if agree else None
    effect = None if votes is None else votes.value / 100 - 0.5
    if not full_budget:
        why += " The rows here are short runs, which cannot settle it."
        return Found(votes, Judged(Verdict.OPEN, Reason.SHORT, why), effect)
    if not agree:
        return Found(votes, Judged(Verdict.OPEN, Reason.CHANCE, why), effect)
    if against:
        return Found(votes, Judged(Verdict.DIFFERS, Reason.REVERSED, why), effect)
    return Found(votes, Judged(Verdict.REPRODUCED, None, why), effect)
