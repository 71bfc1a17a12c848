"""Scenes of known truth: pairs that differ in one factor, and the levels of factors that a scene shows."""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from patchbook.scenes.catalogue import concepts, trained_mask
from patchbook.scenes.pictograms import (
    GROUNDS,
    SLOTS,
    STYLE_WORDS,
    TINTS,
    Layout,
    SceneConfig,
    ground_kind,
    layout,
    uniforms,
    written_words,
)
from patchbook.scenes.sprites import STYLES

# as cluttered as the scenes that the SAE is trained on; more words, for each needs scenes that show it
SCENES = SceneConfig(objects=(0.6, 0.2, 0.12, 0.08), word_rate=0.45, tint=0.2)
QUADRANTS = ("upper left", "upper right", "lower left", "lower right")
SIZES = ("small", "middle", "large")
EDGES = np.array([0.275, 0.5, 0.725, 0.95])  # thirds of the sides that objects of SCENES can have
AWAY = (
    0.3  # least distance of the first object of a pair from the middle lines, so that its place can change
)


class Factor(StrEnum):
    """What a scene is made of; each part can be changed alone."""

    OBJECT = "object"
    STYLE = "style"
    COLOUR = "colour"
    POSITION = "position"
    SIZE = "size"
    BACKGROUND = "background"
    WORD = "written word"


class Levels(NamedTuple):
    """The L levels that the factors have."""

    names: tuple[str, ...]
    factor: np.ndarray
    """Position in Factor: int64 [L]."""


class Pair(NamedTuple):
    """Plans of n scenes twice, different in one factor, and which of its levels each has."""

    a: Layout
    b: Layout
    level_a: np.ndarray
    """Number of the first object's (or the scene's) level inside the factor: int64 [n], -1 for none."""
    level_b: np.ndarray


_NAMES: dict[Factor, Callable[[], tuple[str, ...]]] = {
    Factor.OBJECT: lambda: tuple(concept.name for concept in concepts()),
    Factor.STYLE: lambda: STYLE_WORDS[: len(STYLES)],
    Factor.COLOUR: lambda: tuple(TINTS),
    Factor.POSITION: lambda: QUADRANTS,
    Factor.SIZE: lambda: SIZES,
    Factor.BACKGROUND: lambda: tuple(GROUNDS),
    Factor.WORD: lambda: tuple(concepts()[i].name for i in written_words()),
}


@lru_cache
def levels() -> Levels:
    """Name the levels of all factors, in the order of Factor; the last is 'any word'."""
    names = {factor: of() for factor, of in _NAMES.items()}
    names[Factor.WORD] += ("any word",)
    factor = np.repeat(np.arange(len(names)), [len(own) for own in names.values()])
    return Levels(tuple(name for own in names.values() for name in own), factor)


def level_numbers(plan: Layout, factor: Factor) -> np.ndarray:
    """Tell which level of a factor each object, or the scene, has: int64 [B, SLOTS or 1], -1 for none.

    A place is a quadrant, because several objects are put one to a quadrant: halves would be full on
    both sides in most scenes.
    """
    if factor is Factor.BACKGROUND:
        return ground_kind(plan.ground)[:, None]
    if factor is Factor.WORD:
        return plan.word[:, None]
    x, y = np.moveaxis(plan.centre[:, :SLOTS] > 0, -1, 0)
    number = {
        Factor.OBJECT: plan.concepts, Factor.STYLE: plan.styles, Factor.COLOUR: plan.tint,
        Factor.POSITION: x + 2 * y, Factor.SIZE: np.digitize(plan.scale[:, :SLOTS], EDGES[1:-1]),
    }[factor]  # fmt: skip
    return np.where(plan.concepts >= 0, number, -1)


def shown(plan: Layout) -> np.ndarray:
    """Tell which levels a scene shows, on any of its objects: bool [B, L] in the order of `levels`."""
    parts = []
    for factor, names in _NAMES.items():
        number = level_numbers(plan, factor)
        parts.append((number[..., None] == np.arange(len(names()))).any(1))
    return np.concatenate([*parts, (plan.word >= 0)[:, None]], 1)


def plan_scenes(n: int, key: str) -> Layout:
    """Plan n scenes in which every trained concept and every word comes equally often, dealt like cards.

    What is written has nothing to do with the objects. Only trained pairs of concept and style appear.
    """
    plan = layout(key, np.arange(n), SCENES)
    present, trained = plan.concepts >= 0, trained_mask()
    known, m = np.flatnonzero(trained.any(0)), int(present.sum())
    concept, style, word = plan.concepts.copy(), plan.styles.copy(), plan.word.copy()
    concept[present] = known[_deal(f"{key}/concepts", m, len(known))]
    u = uniforms(f"{key}/styles", np.arange(m), 1)[:, 0]
    style[present] = _choose(trained[:, concept[present]].T, u)
    written = word >= 0
    word[written] = _deal(f"{key}/words", int(written.sum()), len(written_words()))
    return plan._replace(concepts=concept, styles=style, word=word)


def pair_base(n: int, key: str) -> Layout:
    """Plan n scenes whose first object lies far enough from the middle to change its place."""
    plan = plan_scenes(n, key)
    centre = plan.centre.copy()
    first = centre[:, 0]
    centre[:, 0] = np.where(first > 0, 1, -1) * np.maximum(abs(first), AWAY)
    return plan._replace(centre=centre)


def differ(plan: Layout, factor: Factor, key: str) -> Pair:
    """Pair scenes with the same scenes of which one factor has another level, and nothing else is other.

    Object, style, colour, place and size are those of the first object; only trained pairs of concept and
    style appear, and a place is mirrored, so that as much of the object stays in view. Colour and word may
    appear and vanish.
    """
    n, trained, first = len(plan.concepts), trained_mask(), np.arange(len(plan.concepts))
    u = uniforms(f"{key}/{factor}", np.arange(n), 18)
    now = level_numbers(plan, factor)[:, 0]
    allowed = {Factor.OBJECT: trained[plan.styles[:, 0]], Factor.STYLE: trained[:, plan.concepts[:, 0]].T}
    options = allowed.get(factor, np.ones((n, len(_NAMES[factor]())), bool))
    none = np.full((n, 1), factor in (Factor.COLOUR, Factor.WORD))
    options = np.concatenate([none, options], 1)
    options[first, now + 1] = False
    new = _choose(options, u[:, 0]) - 1
    if factor is Factor.WORD:
        new = np.where((now >= 0) & (u[:, 1] < 0.5), -1, new)  # else words would hardly ever vanish
    return Pair(plan, _with_level(plan, factor, new, u[:, 2:]), now, new)


def _with_level(plan: Layout, factor: Factor, new: np.ndarray, u: np.ndarray) -> Layout:
    if factor is Factor.WORD:
        return plan._replace(word=new)
    if factor is Factor.BACKGROUND:
        edges = np.cumsum([0, *GROUNDS.values()])
        ground = u.copy()
        ground[:, 0] = edges[new] + u[:, 0] * np.diff(edges)[new]
        return plan._replace(ground=ground)
    name = {
        Factor.OBJECT: "concepts", Factor.STYLE: "styles", Factor.COLOUR: "tint",
        Factor.POSITION: "centre", Factor.SIZE: "scale",
    }[factor]  # fmt: skip
    value = getattr(plan, name).copy()
    if factor is Factor.POSITION:
        value[:, 0] = abs(value[:, 0]) * np.stack([2 * (new % 2) - 1, 2 * (new // 2) - 1], -1)
    elif factor is Factor.SIZE:
        value[:, 0] = EDGES[new] + u[:, 0] * np.diff(EDGES)[new]
    else:
        value[:, 0] = new
    return plan._replace(**{name: value})


def _deal(key: str, n: int, cards: int) -> np.ndarray:
    """Deal n numbers below `cards`, none a second time before all were dealt: int64 [n]."""
    whole = -(-n // cards) * cards
    return np.lexsort((uniforms(key, np.arange(whole), 1)[:, 0], np.arange(whole) // cards))[:n] % cards


def _choose(options: np.ndarray, u: np.ndarray) -> np.ndarray:
    """Choose one of the allowed options [n, k] for each row, all equally likely, by u [n]: int64 [n]."""
    count = options.cumsum(1)
    return (count <= (u * count[:, -1]).astype(np.int64)[:, None]).sum(1)
