"""Pairs of scenes: exactly one factor differs, in the plan and in the pixels; levels and dealing."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from patchbook.chapters.factors import (
    AWAY,
    SCENES,
    SIZES,
    Factor,
    differ,
    level_numbers,
    levels,
    pair_base,
    plan_scenes,
    shown,
)
from patchbook.scenes import pictograms
from patchbook.scenes.catalogue import concepts, trained_mask
from patchbook.scenes.pictograms import GROUNDS, SLOTS, Layout, ground_kind, paint, written_words

FIELD = {
    Factor.OBJECT: "concepts", Factor.STYLE: "styles", Factor.COLOUR: "tint", Factor.POSITION: "centre",
    Factor.SIZE: "scale", Factor.BACKGROUND: "ground", Factor.WORD: "word",
}  # fmt: skip
N = 60


@pytest.fixture(scope="module")
def base():
    return pair_base(N, "test")


def on_page(plan: Layout, level: int, monkeypatch) -> torch.Tensor:
    """Draw on a page of one level instead of a background."""

    def page(ground, split, size, device):
        return torch.full((len(ground), 3, size, size), float(level), device=device)

    with monkeypatch.context() as patch:
        patch.setattr(pictograms, "_background", page)
        return paint(plan, "test", SCENES.size).images


def drawn(plan: Layout, factor: Factor, monkeypatch) -> torch.Tensor:
    """Mark the pixels that the first object (or the word) reaches, its faintest edge too."""
    concept, word = plan.concepts.copy(), plan.word
    concept[:, 0 if factor is Factor.WORD else 1 :] = -1
    if factor is not Factor.WORD:
        word = np.full(len(word), -1)
    alone = plan._replace(concepts=concept, word=word)
    touched = [(on_page(alone, level, monkeypatch) != level).any(1) for level in (0, 255)]
    return F.max_pool2d(torch.stack(touched).any(0)[:, None].float(), 3, 1, 1)[:, 0] > 0


@pytest.mark.parametrize("factor", Factor)
def test_only_the_factor_of_a_pair_differs_in_its_plan(base, factor):
    pair = differ(base, factor, "test")
    for name, one, other in zip(base._fields, pair.a, pair.b, strict=True):
        if name != FIELD[factor]:
            np.testing.assert_array_equal(one, other)
    one, other = getattr(pair.a, FIELD[factor]), getattr(pair.b, FIELD[factor])
    if factor not in (Factor.BACKGROUND, Factor.WORD):
        np.testing.assert_array_equal(one[:, 1:], other[:, 1:])  # the first object alone
    assert (pair.level_a != pair.level_b).all()
    for plan, told in ((pair.a, pair.level_a), (pair.b, pair.level_b)):
        np.testing.assert_array_equal(level_numbers(plan, factor)[:, 0], told)
    # nothing that the SAE's training never saw
    present = pair.b.concepts >= 0
    assert trained_mask()[pair.b.styles[present], pair.b.concepts[present]].all()


@pytest.mark.parametrize("factor", Factor)
def test_only_the_factor_of_a_pair_differs_in_its_pixels(base, factor, monkeypatch):
    pair = differ(base, factor, "test")
    a, b = (paint(plan, "test", SCENES.size).images for plan in (pair.a, pair.b))
    if factor is Factor.BACKGROUND:
        on_black, on_white = (on_page(base, level, monkeypatch) for level in (0, 255))
        may = (on_black != on_white).any(1)  # anything that is not wholly covered
    else:
        may = drawn(pair.a, factor, monkeypatch) | drawn(pair.b, factor, monkeypatch)
    same = (a == b).all(1)
    assert same[~may].all()
    assert (~may).float().mean() > 0.1  # so that this says something
    assert (~same).flatten(1).any(1).float().mean() > 0.9


def test_pairs_cover_the_levels_and_follow_from_the_key():
    base = pair_base(400, "test")
    assert abs(base.centre[:, 0]).min() >= AWAY
    for factor, levels_wanted in ((Factor.POSITION, 4), (Factor.SIZE, len(SIZES)), (Factor.STYLE, 3),
                                  (Factor.BACKGROUND, len(GROUNDS)), (Factor.COLOUR, 7)):  # fmt: skip
        pair, again, other = differ(base, factor, "k"), differ(base, factor, "k"), differ(base, factor, "l")
        assert len(np.unique(pair.level_b)) == levels_wanted
        assert (pair.level_b == again.level_b).all() and (pair.level_b != other.level_b).any()
    word = differ(base, Factor.WORD, "k")
    assert {(bool(x >= 0), bool(y >= 0)) for x, y in zip(word.level_a, word.level_b, strict=True)} == {
        (True, True), (True, False), (False, True),
    }  # fmt: skip


def test_a_place_is_mirrored_and_nothing_else():
    base = pair_base(50, "test")
    moved = differ(base, Factor.POSITION, "k").b
    np.testing.assert_array_equal(abs(moved.centre), abs(base.centre))


def test_concepts_and_words_are_dealt_evenly():
    plan = plan_scenes(2000, "test")
    present = plan.concepts >= 0
    known = np.flatnonzero(trained_mask().any(0))
    for dealt, cards in ((plan.concepts[present], known), (plan.word[plan.word >= 0], written_words())):
        count = np.bincount(dealt)
        count = count[known] if cards is known else count
        assert len(count) == len(cards) and count.max() - count.min() <= 1
    assert trained_mask()[plan.styles[present], plan.concepts[present]].all()
    assert (plan.concepts == plan_scenes(2000, "test").concepts).all()


def test_levels_say_what_a_scene_shows():
    plan, names = plan_scenes(300, "test"), levels()
    table = shown(plan)
    assert table.shape == (300, len(names.names)) and names.names[-1] == "any word"
    factor = np.array([list(Factor)[f] for f in names.factor])
    for row in range(300):
        here = [names.names[i] for i in np.flatnonzero(table[row] & (factor == Factor.OBJECT))]
        assert set(here) == {concepts()[c].name for c in plan.concepts[row] if c >= 0}
    assert (table[:, -1] == (plan.word >= 0)).all()
    ground = table[:, factor == Factor.BACKGROUND]
    assert (ground.argmax(1) == ground_kind(plan.ground)).all() and (ground.sum(1) == 1).all()
    one = (plan.concepts >= 0).sum(1) == 1
    left = np.flatnonzero(factor == Factor.POSITION)[[0, 2]]
    assert (table[one][:, left].any(1) == (plan.centre[one, 0, 0] <= 0)).all()
    small = np.flatnonzero(factor == Factor.SIZE)[0]
    assert (table[one, small] == (plan.scale[one, 0] < 0.5)).all()
    assert plan.tint.shape == (300, SLOTS)
