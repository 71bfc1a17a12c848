"""The rules of chapters 1 to 3 and 6: each with a case that holds, one that fails, one left open."""

import numpy as np
import pytest

from patchbook.chapters.verdicts_of_latents import (
    at_home,
    consistent_elsewhere,
    in_two_clusters,
    lacking,
    points_better,
    reads_and_sees,
    richer_deeper,
    same_directions,
    shared_across,
)
from patchbook.report import Reason, Verdict, finding
from patchsae.runs.intervals import Interval

HOLDS, DIFFERS, OPEN, PAPER = (
    Verdict.REPRODUCED,
    Verdict.DIFFERS,
    Verdict.OPEN,
    Verdict.PAPER_SCALE,
)


def hits(share, n=400, seed=0):
    return (np.random.default_rng(seed).random(n) < share).astype(float)


def as_finding(found):
    """Refuse what `finding` would refuse: a verdict without a reason or a sentence."""
    return finding("Fig. 2", claim="c", quantity="q", rule="r", effect_name="e", **found.told())


@pytest.mark.parametrize(
    ("best", "untrained", "area", "verdict", "reason"),
    [
        (0.8, 0.4, 0.2, HOLDS, None),
        (0.4, 0.8, 0.2, DIFFERS, Reason.REVERSED),
        (0.6, 0.6, 0.2, OPEN, Reason.FEW),
        (0.2, 0.1, 0.8, DIFFERS, Reason.CHANCE),  # ahead of untrained, but no better than the area
    ],
)
def test_fig_2_needs_the_area_and_the_untrained_sae_beaten(best, untrained, area, verdict, reason):
    found = points_better(hits(best), hits(untrained, seed=1), hits(area, seed=2))
    assert (found.judged.verdict, found.judged.reason) == (verdict, reason)
    assert bool(found.judged.why) == (verdict is not HOLDS)
    assert as_finding(found).ours == pytest.approx(100 * (hits(best) - hits(untrained, seed=1)).mean())


def latents(centres, n=300, spread=0.2, seed=0):
    """Return frequency and activation of latents around centres of their logarithms."""
    rng = np.random.default_rng(seed)
    points = np.concatenate([c + spread * rng.standard_normal((n, 2)) for c in np.array(centres)])
    return 10**points.T


def test_fig_3_needs_more_than_one_cluster_along_the_diagonal():
    two = in_two_clusters(*latents([(-3, -1), (-1, 1)]))
    assert two.judged.verdict is HOLDS and "2 peaks" in two.judged.why
    one = in_two_clusters(*latents([(-2, 0)]))
    assert (one.judged.verdict, one.judged.reason) == (DIFFERS, Reason.ABSENT)
    assert "1 peak:" in one.judged.why
    against = in_two_clusters(*latents([(-3, 1), (-2.8, 3), (-1, -1), (-0.8, 0.2)]))
    assert against.ours.value < 0 and against.judged.verdict is DIFFERS
    flat = in_two_clusters(np.ones(5), np.arange(1.0, 6))
    assert (flat.ours, flat.judged.reason) == (None, Reason.LACKING)


def test_fig_10_asks_only_latents_with_all_references():
    observed, null = np.full((2, 60), np.nan), np.full((2, 60), np.nan)
    rng = np.random.default_rng(0)
    observed[0, :40], null[0, :40] = 0.6 + 0.1 * rng.random(40), 0.3
    found = consistent_elsewhere(observed, null)
    assert found.judged.verdict is HOLDS and found.effect == pytest.approx(2.17, abs=0.1)
    assert found.ours.value == pytest.approx(100 * (observed[0, :40] - 0.3).mean())
    worse = consistent_elsewhere(null, observed)
    assert (worse.judged.verdict, worse.judged.reason) == (DIFFERS, Reason.REVERSED)
    nothing = consistent_elsewhere(np.full((2, 3), np.nan), np.full((2, 3), np.nan))
    assert (nothing.judged.verdict, nothing.judged.reason) == (OPEN, Reason.LACKING)


def test_fig_14_counts_sets_that_had_other_images():
    titles = [f"set {n}" for n in range(10)]
    own = np.ones(10, bool)
    assert at_home(own, own, titles).judged.verdict is HOLDS
    never = at_home(~own, own, titles)
    assert never.judged.verdict is OPEN or never.judged.verdict is DIFFERS
    assert "set 0" in never.judged.why and never.ours.value == 0
    missing = at_home(own, np.arange(10) < 1, titles)
    assert missing.ours.low < 100 and "set" not in missing.judged.why
    assert at_home(own, ~own, titles).judged.reason is Reason.LACKING
    assert at_home(own[:1], own[:1], titles[:1]).judged.reason is Reason.LACKING


@pytest.mark.parametrize(
    ("gap", "verdict", "reason"),
    [(2.0, HOLDS, None), (-2.0, DIFFERS, Reason.REVERSED), (0.0, OPEN, Reason.FEW)],
)
def test_fig_4_compares_the_same_class_with_others(gap, verdict, reason):
    rng = np.random.default_rng(0)
    same, other = 4 + gap + rng.standard_normal(80), 4 + rng.standard_normal(80)
    found = shared_across(same, other)
    assert (found.judged.verdict, found.judged.reason) == (verdict, reason)
    assert np.sign(found.effect) == np.sign(found.ours.value)


def test_fig_9_needs_better_masks_and_higher_activations():
    rng = np.random.default_rng(0)
    low, high = 0.1 * rng.standard_normal((2, 200))
    up = richer_deeper([low, high + 0.3], [1.0, 2.0], [0.1, 0.2])
    assert up.judged.verdict is HOLDS and "Relative" not in up.judged.why
    assert "Relative to the length" in richer_deeper([low, high + 0.3], [1, 2], [0.2, 0.1]).judged.why
    weaker = richer_deeper([low, high + 0.3], [2.0, 1.0], [0.1, 0.2])
    assert (weaker.judged.verdict, weaker.judged.reason) == (DIFFERS, Reason.REVERSED)
    worse = richer_deeper([low + 0.3, high], [1.0, 2.0], [0.1, 0.2])
    assert (worse.judged.verdict, worse.judged.reason) == (DIFFERS, Reason.REVERSED)
    assert "−" in worse.judged.why or "+" in worse.judged.why


@pytest.mark.parametrize(
    ("n", "reading", "verdict", "reason"),
    [
        (40, Interval(0.5, 0.4, 0.6), HOLDS, None),
        (3, Interval(0.5, 0.4, 0.6), DIFFERS, Reason.ABSENT),
        (3, Interval(0.05, 0.01, 0.1), PAPER, Reason.WEAK),  # it cannot read: no case against the paper
    ],
)
def test_fig_13_asks_first_whether_the_model_reads(n, reading, verdict, reason):
    null = np.random.default_rng(0).poisson(3, 1000)
    found = reads_and_sees(n, null, reading, words=20)
    assert (found.judged.verdict, found.judged.reason) == (verdict, reason)
    assert found.ours == n - null.mean()


def test_fig_13_without_any_spread_has_no_effect_size():
    assert reads_and_sees(0, np.zeros(10), Interval(0.5, 0.4, 0.6), 20).effect is None


def test_table_2_is_decided_at_the_full_budget_alone():
    with_paper = {("λ = 0", "MSE"): True, ("no ghost", "L0"): True}
    against = with_paper | {("no ghost", "L0"): False}
    assert same_directions(with_paper, True).judged.verdict is HOLDS
    short = same_directions(with_paper, False)
    assert (short.judged.verdict, short.judged.reason) == (OPEN, Reason.SHORT)
    found = same_directions(against, True)
    assert (found.judged.verdict, found.judged.reason) == (DIFFERS, Reason.REVERSED)
    assert "L0 of 'no ghost'" in found.judged.why and found.effect == 0
    nothing = same_directions({}, True)
    assert (nothing.judged.verdict, nothing.judged.reason, nothing.ours) == (OPEN, Reason.CHANCE, None)


def test_what_is_lacking_is_said_and_is_a_finding():
    found = lacking("There are no masks.")
    assert as_finding(found).why == "There are no masks."
    assert (found.ours, found.judged.verdict, found.judged.reason) == (None, OPEN, Reason.LACKING)
