"""Estimates with their intervals: bootstraps over images, exact tests, and ranks.

scipy.stats takes half a second of a start, so it is imported by the functions that need it.
"""

from __future__ import annotations

from typing import Generic, NamedTuple, TypeVar

import numpy as np

from patchsae.runs.errors import PatchSAEError

Of = TypeVar("Of")


class Interval(NamedTuple, Generic[Of]):
    """An estimate with its 95 % bootstrap interval: of a number, or of an array of them."""

    value: Of
    low: Of
    high: Of


def bootstrap(values: np.ndarray, seed: int = 0, draws: int = 2000) -> Interval:
    """Return the mean of `values` [N, ...] with a percentile interval over resampled images.

    For one axis the three fields are numbers, for more arrays of the shape of values[0].
    """
    values = np.asarray(values, dtype=np.float64)
    rng, n = np.random.default_rng(seed), len(values)
    flat = values.reshape(n, -1)
    means = np.empty((draws, flat.shape[1]))
    for draw in range(draws):
        means[draw] = np.bincount(rng.integers(n, size=n), minlength=n) @ flat / n
    low, high = np.quantile(means, (0.025, 0.975), axis=0)
    parts = flat.mean(0), low, high
    return Interval(*(float(p[0]) if values.ndim == 1 else p.reshape(values.shape[1:]) for p in parts))


def bootstrap_ratio(a: np.ndarray, b: np.ndarray, seed: int = 0, draws: int = 2000) -> Interval:
    """Return Σa / Σb of a, b [N] with a percentile interval over resampled images; NaN where Σb is 0."""
    rng, n = np.random.default_rng(seed), len(a)
    both = np.stack([a, b], 1).astype(np.float64)
    drawn = np.stack([np.bincount(rng.integers(n, size=n), minlength=n) @ both for _ in range(draws)])
    with np.errstate(invalid="ignore", divide="ignore"):
        value, ratios = np.divide(*both.sum(0)), drawn[:, 0] / drawn[:, 1]
    ratios = ratios[np.isfinite(ratios)]
    bounds = np.quantile(ratios, (0.025, 0.975)) if len(ratios) else (np.nan, np.nan)
    return Interval(float(value) if np.isfinite(value) else np.nan, *map(float, bounds))


def rank_correlation(a: np.ndarray, b: np.ndarray, seed: int = 0, draws: int = 1000) -> Interval:
    """Return Spearman's correlation of a and b [N] with a percentile interval over resampled pairs.

    Ranks are taken anew in each resample. NaN where either is constant.
    """
    from scipy.stats import rankdata

    def spearman(pairs: np.ndarray) -> float:
        with np.errstate(invalid="ignore", divide="ignore"):
            return float(np.corrcoef(rankdata(pairs, axis=1))[0, 1])

    pairs, rng = np.stack([a, b]), np.random.default_rng(seed)
    n = pairs.shape[1]
    found = [spearman(pairs[:, rng.integers(n, size=n)]) for _ in range(draws)]
    low, high = np.quantile(found, (0.025, 0.975))
    return Interval(spearman(pairs), float(low), float(high))


def group_auroc(score: np.ndarray, member: np.ndarray, chunk: int = 512) -> np.ndarray:
    """Compute how well each score tells each group from the rest: [N, U], bool [N, L] to float64 [L, U].

    The probability that a member's score is higher than another's, ties counted half: the rank sums of all
    groups in one product, `chunk` scores at a time. NaN for a group of all or none.

    Raises
    ------
    PatchSAEError : a score is not finite.
    """
    from scipy.stats import rankdata

    if not np.isfinite(score).all():
        raise PatchSAEError(
            "scores with NaN or infinity cannot be ranked; check the weights they came from."
        )
    count, sides = member.sum(0)[:, None], member.T.astype(np.float64)
    found = np.empty((member.shape[1], score.shape[1]))
    with np.errstate(invalid="ignore", divide="ignore"):
        for first in range(0, score.shape[1], chunk):
            part = np.s_[:, first : first + chunk]
            rank = rankdata(score[part], axis=0)
            found[part] = (sides @ rank / count - (count + 1) / 2) / (len(score) - count)
    return found


def wilson(right: np.ndarray, of: np.ndarray) -> Interval:
    """Return shares `right` / `of` with 95 % Wilson intervals, which stay honest for few and near 0 and 1.

    Counts of any common shape; NaN where there are none.
    """
    z = 1.959963984540054  # the normal distribution's 97.5 % quantile
    with np.errstate(invalid="ignore", divide="ignore"):
        share, weight = np.divide(right, of), 1 / (1 + z * z / np.asarray(of))
        centre = weight * (share + z * z / (2 * np.asarray(of)))
        half = weight * z * np.sqrt(share * (1 - share) / of + z * z / (4 * np.square(of, dtype=float)))
    return Interval(share, np.clip(centre - half, 0, 1), np.clip(centre + half, 0, 1))


class McNemar(NamedTuple):
    """Whether two models err on different numbers of the same images."""

    only_first: int
    """Images that only the first gets right."""
    only_second: int
    p: float
    """Two-sided, exact."""


def mcnemar(first: np.ndarray, second: np.ndarray) -> McNemar:
    """Test whether two models, right or wrong on the same images (bool [N] each), differ in accuracy."""
    from scipy.stats import binomtest

    first, second = np.asarray(first, bool), np.asarray(second, bool)
    a, b = int((first & ~second).sum()), int((~first & second).sum())
    return McNemar(a, b, float(binomtest(a, a + b).pvalue) if a + b else 1.0)


def share_of_gain(
    before: np.ndarray, after: np.ndarray, mixed: np.ndarray, seed: int = 0, draws: int = 2000
) -> Interval:
    """Return which share of the gain from `before` to `after` a mixed model has: [N] right or wrong each.

    (mixed - before) / (after - before) of accuracies, with a percentile bootstrap over images. NaN where
    there is no gain; where the gain's interval holds 0 that of the share means nothing.
    """
    before, after, mixed = (np.asarray(right, np.float64) for right in (before, after, mixed))
    return bootstrap_ratio(mixed - before, after - before, seed, draws)


def difference_of_shares(
    before: np.ndarray,
    after: np.ndarray,
    first: np.ndarray,
    second: np.ndarray,
    seed: int = 0,
    draws: int = 2000,
) -> Interval:
    """Return how much more of a gain one mixed model has than another: `share_of_gain` of both, subtracted.

    Both shares are taken of the same draw of images, so that what they have in common cancels; two
    intervals that overlap leave open what this one may decide.
    """
    before, after, first, second = (np.asarray(r, np.float64) for r in (before, after, first, second))
    return bootstrap_ratio(first - second, after - before, seed, draws)
