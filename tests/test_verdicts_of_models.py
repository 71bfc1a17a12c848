"""Each rule of the report with a case that must hold and one that must fail."""

import math

import numpy as np
import pytest

from patchbook.chapters.verdicts_of_models import (
    HOLDS,
    Judged,
    all_of,
    better_and_high,
    cohens_d,
    cohens_h,
    correlation_draws,
    difference_of_means,
    far_and_gaining,
    is_above,
    is_within,
    lowest_correlation,
    masks_tell,
    most_by_far,
    no_matter_who_ranks,
    ratio,
    reason_above,
    reason_within,
    unseen_gains_more,
)
from patchbook.report import Reason, Verdict
from patchsae.runs.errors import PatchSAEError
from patchsae.runs.intervals import Interval

REPRODUCED, DIFFERS, OPEN = Verdict.REPRODUCED, Verdict.DIFFERS, Verdict.OPEN
NEAR, FAR, ACROSS = Interval(0.5, 0.1, 0.9), Interval(5.0, 4.0, 6.0), Interval(1.5, 0.5, 2.5)


@pytest.mark.parametrize(
    ("found", "bound", "reason"),
    [
        (Interval(1.0, 0.5, 1.5), 0, None),
        (Interval(-1.0, -1.5, -0.5), 0, Reason.REVERSED),
        (Interval(0.1, 0.05, 0.2), 0.9, Reason.ABSENT),
        (Interval(0.0, -1.0, 1.0), 0, Reason.FEW),
        (None, 0, Reason.LACKING),
    ],
)
def test_why_something_is_not_above_a_bound(found, bound, reason):
    assert reason_above(found, bound) == reason
    if found is not None:
        judged = is_above(found, bound)
        assert judged.reason == reason and bool(judged.why) == (reason is not None)


@pytest.mark.parametrize(
    ("found", "reason"), [(NEAR, None), (FAR, Reason.PRESENT), (ACROSS, Reason.FEW), (None, Reason.LACKING)]
)
def test_why_something_is_not_within_a_margin(found, reason):
    assert reason_within(found, 1) == reason
    if found is not None:
        judged = is_within(found, 1)
        assert judged.reason == reason and bool(judged.why) == (reason is not None)


def test_a_sentence_is_taken_by_the_verdict():
    why = {OPEN: "Nobody knows."}
    assert is_above(Interval(0.0, -1.0, 1.0), why=why).why == "Nobody knows."
    assert is_above(Interval(-1.0, -2.0, -0.5), why=why).why == "The whole interval lies below 0."
    assert is_above(Interval(1.0, 0.5, 2.0), why=why).why == ""
    assert is_within(NEAR, 1, why="Always.").why == "Always."


def test_a_statement_of_parts_is_as_good_as_its_worst():
    open_, differs = Judged(OPEN, Reason.FEW, "Few."), Judged(DIFFERS, Reason.REVERSED, "Less.")
    assert all_of(HOLDS, HOLDS) == HOLDS
    assert all_of(HOLDS, open_) == open_
    assert all_of(open_, HOLDS, differs) == Judged(DIFFERS, Reason.REVERSED, "Few. Less.")
    assert all_of(HOLDS, Judged(REPRODUCED, None, "And so.")).why == "And so."
    with pytest.raises(PatchSAEError, match="without parts"):
        all_of()


def test_cohens_d_is_a_difference_in_standard_deviations():
    assert cohens_d(np.array([1.0, 2.0, 3.0])) == pytest.approx(2)
    assert cohens_d(np.array([2.0, 4.0]), np.array([1.0, 3.0])) == pytest.approx(1 / math.sqrt(2))
    assert cohens_d(np.array([-1.0, 1.0])) == 0
    assert cohens_d(np.array([2.0, 2.0])) is None and cohens_d(np.array([1.0])) is None
    assert cohens_d(np.array([1.0, 2.0]), np.array([])) is None
    with pytest.raises(PatchSAEError, match="NaN"):
        cohens_d(np.array([1.0, np.nan]))


def test_other_effects_are_those_of_the_textbook():
    assert cohens_h(0.5, 0.5) == 0 and cohens_h(1, 0) == pytest.approx(math.pi)
    assert ratio(3, 2) == 1.5 and ratio(1, 0) is None
    with pytest.raises(PatchSAEError, match="NaN"):
        ratio(math.nan, 1)
    for share in (math.nan, 1.5):
        with pytest.raises(PatchSAEError, match="shares in 0"):
            cohens_h(share, 0.5)


def test_a_difference_of_means_resamples_both_groups():
    rng = np.random.default_rng(0)
    one, two = rng.normal(3, 1, 400), rng.normal(1, 1, 100)
    found = difference_of_means(one, two, seed=1)
    assert found == difference_of_means(one, two, seed=1)
    assert found.value == one.mean() - two.mean()
    half = 1.96 * math.sqrt(one.var() / 400 + two.var() / 100)
    assert found.high - found.low == pytest.approx(2 * half, rel=0.1)
    for bad in (np.array([]), np.array([np.nan])):
        with pytest.raises(PatchSAEError, match="two groups"):
            difference_of_means(one, bad)


def sizes(**means):
    """Return a count per class around each mean, 40 classes each."""
    rng = np.random.default_rng(0)
    return {name: rng.poisson(mean, 40).astype(float) for name, mean in means.items()}


@pytest.mark.parametrize(
    ("means", "verdict", "reason"),
    [
        ({"odd": 9.0, "b": 2.0, "c": 1.0}, REPRODUCED, None),
        ({"odd": 3.0, "b": 2.6, "c": 1.0}, DIFFERS, Reason.ABSENT),  # the most, but not by far
        ({"odd": 1.0, "b": 4.0, "c": 1.0}, DIFFERS, Reason.REVERSED),
        ({"odd": 4.2, "b": 2.0, "c": 2.0}, OPEN, Reason.FEW_CLASSES),
    ],
)
def test_by_far_means_more_than_twice_the_next(means, verdict, reason):
    lead = most_by_far(sizes(**means), "odd", factor=2)
    assert (lead.judged.verdict, lead.judged.reason) == (verdict, reason)
    assert lead.found.low <= lead.found.value
    assert lead.effect == pytest.approx(np.mean(sizes(**means)["odd"]) / np.mean(sizes(**means)[lead.next]))


def test_by_far_of_nothing_at_all_in_the_others_has_no_ratio():
    lead = most_by_far({"odd": np.array([3.0, 4.0]), "b": np.zeros(2)}, "odd")
    assert lead.effect is None and lead.judged.verdict is REPRODUCED
    with pytest.raises(PatchSAEError, match="NaN"):
        most_by_far({"odd": np.array([np.nan]), "b": np.ones(2)}, "odd")


@pytest.mark.parametrize(("groups", "name"), [(["odd"], "odd"), (["a", "b"], "odd"), (["a", "b"], None)])
def test_a_set_that_is_alone_or_not_there_decides_nothing(groups, name):
    ones = np.arange(6.0).reshape(2, 3)
    for lead in (
        most_by_far(dict.fromkeys(groups, np.ones(3)), name),
        lowest_correlation(dict.fromkeys(groups, (ones, ones)), name),
    ):
        assert (lead.judged.verdict, lead.judged.reason) == (OPEN, Reason.LACKING)
        assert lead.effect is None and math.isnan(lead.found.value) and lead.judged.why
    assert far_and_gaining(lead, name, 1, 1) == lead.judged


def test_fig_18_needs_the_gain_too():
    lead = most_by_far(sizes(odd=9.0, b=2.0), "odd")
    assert far_and_gaining(lead, "odd", 2, 9).verdict is REPRODUCED
    third = far_and_gaining(lead, "odd", 3, 9)
    assert (third.verdict, third.reason, third.why) == (
        DIFFERS,
        Reason.ABSENT,
        "odd has gain number 3 of 9.",
    )
    less = far_and_gaining(most_by_far(sizes(odd=1.0, b=4.0), "odd"), "odd", 1, 9)
    assert (less.verdict, less.reason) == (DIFFERS, Reason.REVERSED)


def counted(noise, classes=12, latents=300, seed=0):
    """Return counts of classes and latents before, and after with some noise."""
    rng = np.random.default_rng(seed)
    before = rng.poisson(rng.gamma(0.5, 8, latents), (classes, latents)).astype(float)
    return before, before + rng.poisson(rng.gamma(0.5, noise + 1e-9, latents), before.shape)


@pytest.mark.parametrize(
    ("noises", "verdict", "reason"),
    [
        ({"odd": 20, "b": 1, "c": 2}, REPRODUCED, None),
        ({"odd": 1, "b": 20, "c": 2}, DIFFERS, Reason.REVERSED),
        ({"odd": 5, "b": 5, "c": 5}, OPEN, Reason.FEW),
    ],
)
def test_the_lowest_correlation_is_told_from_the_next(noises, verdict, reason):
    counts = {name: counted(noise) for name, noise in noises.items()}
    lead = lowest_correlation(counts, "odd", draws=200)
    assert (lead.judged.verdict, lead.judged.reason) == (verdict, reason)
    assert lead.found.low <= lead.found.value <= lead.found.high or verdict is OPEN
    assert (lead.effect > 0) == (lead.found.value > 0)


def test_few_classes_alone_do_not_make_a_correlation_the_lowest():
    """Counts of fewer classes are noisier, and a resample of few classes is poorer still."""
    verdicts = []
    for seed in range(6):
        before, after = counted(1, classes=84, seed=seed)
        parts = {"odd": slice(0, 4), "b": slice(4, 44), "c": slice(44, 84)}  # of one kind, by construction
        counts = {name: (before[part], after[part]) for name, part in parts.items()}
        raw = {name: np.corrcoef(*(of.sum(0) for of in pair))[0, 1] for name, pair in counts.items()}
        assert min(raw, key=raw.get) == "odd"
        verdicts.append(lowest_correlation(counts, "odd", draws=200).judged.verdict)
    assert verdicts.count(REPRODUCED) <= 1


def test_correlations_of_resampled_classes_spread_around_their_own():
    before, after = counted(3)
    drawn = correlation_draws(before, after, draws=100)
    whole = np.corrcoef(before.sum(0), after.sum(0))[0, 1]
    assert drawn.shape == (100,) and abs(np.median(drawn) - whole) < 0.05
    assert np.ptp(correlation_draws(before[:1], after[:1], draws=5)) == 0  # one class is the same each time


def test_counts_that_are_all_alike_have_no_correlation():
    same = np.ones((2, 5))
    lead = lowest_correlation({"odd": (same, same), "b": counted(1)}, "odd")
    assert lead.judged.reason is Reason.LACKING and "odd" in lead.judged.why


@pytest.mark.parametrize(
    ("base", "novel", "verdict", "reason"),
    [
        (Interval(0.1, -0.5, 0.7), Interval(-0.2, -0.9, 0.5), REPRODUCED, None),
        (Interval(1.2, 0.6, 1.8), Interval(-0.2, -0.9, 0.5), REPRODUCED, None),
        (Interval(1.2, 0.6, 2.4), Interval(-0.2, -0.9, 0.5), OPEN, Reason.FEW),
        (Interval(0.1, -0.5, 0.7), Interval(4.0, 3.0, 5.0), DIFFERS, Reason.PRESENT),
    ],
)
def test_who_ranks_does_not_matter_within_a_margin_that_is_stated(base, novel, verdict, reason):
    judged = no_matter_who_ranks({"base": base, "novel": novel}, 2)
    assert (judged.verdict, judged.reason) == (verdict, reason)
    said = [half for half, found in (("base", base), ("novel", novel)) if found.low * found.high > 0]
    assert ("excludes 0" in judged.why) == bool(said)
    assert all(f"On {half} classes the interval excludes 0" in judged.why for half in said)


@pytest.mark.parametrize(
    ("change", "verdict", "reason"),
    [
        ({}, REPRODUCED, None),
        ({"nothing": Interval(0.4, 0.3, 0.5)}, DIFFERS, Reason.PRESENT),
        ({"class_ahead": [True, False]}, DIFFERS, Reason.ABSENT),
        ({"others": [Interval(0.2, 0.1, 0.3)]}, DIFFERS, Reason.PRESENT),
        ({"others": [Interval(0.0, -0.01, 0.01), Interval(0.04, 0.0, 0.08)]}, OPEN, Reason.FEW),
    ],
)
def test_fig_5_holds_if_all_of_its_parts_do(change, verdict, reason):
    given = {
        "nothing": Interval(0.01, 0.0, 0.02),
        "chance": 0.01,
        "class_ahead": [True, True],
        "others": [Interval(0.0, -0.01, 0.01)],
        "margin": 0.05,
    }
    judged = masks_tell(**given | change)
    assert (judged.verdict, judged.reason, bool(judged.why)) == (verdict, reason, bool(change))


@pytest.mark.parametrize(
    ("gain", "high", "verdict", "reason"),
    [
        (Interval(0.2, 0.1, 0.3), 9, REPRODUCED, None),
        (Interval(0.2, 0.1, 0.3), 2, DIFFERS, Reason.REVERSED),
        (Interval(0.0, -0.1, 0.1), 9, OPEN, Reason.FEW),
        (Interval(-0.2, -0.3, -0.1), 9, DIFFERS, Reason.REVERSED),
    ],
)
def test_table_1_needs_a_gain_and_latents_that_stay(gain, high, verdict, reason):
    judged = better_and_high(gain, {"high": high, "high_to_low": 1, "low_to_high": 2})
    assert (judged.verdict, judged.reason) == (verdict, reason)


def gains(share, n=300, seed=0):
    """Return gains per image, -1, 0 or 1, of which a share is 1."""
    return (np.random.default_rng(seed).random(n) < share).astype(float)


def test_pairs_never_seen_gain_more_or_do_not():
    unseen, seen = gains(0.34), gains(0.01, seed=1)
    found = unseen_gains_more(seen, unseen)
    assert found.judged.verdict is REPRODUCED and found.effect > 0.5
    assert found.found.value == pytest.approx(100 * (unseen.mean() - seen.mean()))
    assert "Pairs never seen gain" in found.judged.why and "(300 images)" in found.judged.why
    other = unseen_gains_more(unseen, seen)
    assert (other.judged.verdict, other.judged.reason) == (DIFFERS, Reason.REVERSED)
    same = unseen_gains_more(gains(0.3), gains(0.3))
    assert (same.judged.verdict, same.judged.reason) == (OPEN, Reason.FEW)


def test_pairs_of_one_kind_alone_tell_nothing():
    found = unseen_gains_more(gains(0.3), np.array([]))
    assert (found.judged.verdict, found.judged.reason) == (OPEN, Reason.LACKING)
    assert found.effect is None and math.isnan(found.found.value)
