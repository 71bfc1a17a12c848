"""Figures of where latents fire (Fig. 2, 4, 9, 13)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import xarray as xr
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from patchbook.figures.parts import (
    BLUE,
    GREEN,
    SMALL,
    VERMILION,
    WIDTH,
    Shown,
    draw_intervals,
    draw_lines,
    draw_pictures,
    folded,
)
from patchbook.figures.showing import figure_of
from patchsae.runs.intervals import Interval

PLACES = 7
"""Pictures beside one another that leave room for their labels."""


class Level(NamedTuple):
    """What is active at one level: a patch, an image, a class, a data set (Fig. 2)."""

    title: str
    unit: str
    activation: np.ndarray  # [S]
    box: tuple[float, float, float, float] | None  # left, top, width, height of the patch, px
    latent: int
    shown: Shown


@figure_of(
    "Fig. 2",
    caption="From one patch to a whole data set. Each row: the image, which latents are active, "
    "where the strongest of them fires, and the pictures that it fires for most.",
)
def analysis(image: np.ndarray, levels: Sequence[Level], headings: Sequence[str]) -> Figure:
    """Fig. 2: what is active in patches, image, class and data set, and the strongest latent of each.

    A row shows the level's activations, that latent's masks over the image, and its first references;
    `headings` name the masks.
    """
    places = min(max(len(level.shown.references) for level in levels), PLACES - 1 - len(headings))
    width = [1, 2.3, *[1] * (places + len(headings))]
    figure, axes = plt.subplots(
        len(levels), len(width), figsize=(WIDTH, 1.4 * len(levels)), layout="constrained",
        squeeze=False, gridspec_kw={"width_ratios": width},
    )  # fmt: skip
    for line, level in zip(axes, levels, strict=True):
        draw_pictures(line[:1], [image], [level.title])
        if level.box:
            left, top, wide, high = level.box
            line[0].add_patch(Rectangle((left, top), wide, high, fill=False, ec=VERMILION, lw=1.4))
        draw_lines(line[1], level.activation, level.unit, {level.latent: VERMILION})
        masks = line[2 : 2 + len(headings)]
        draw_pictures(masks, level.shown.pictures, headings)
        draw_pictures(line[2 + len(headings) :], level.shown.references, level.shown.labels)
        masks[0].set_title(level.shown.title, fontsize=SMALL, loc="left")
    return figure


@figure_of(
    "Fig. 4",
    caption="Two images of one class and what is active in each. Below, latents that fire in one of "
    "them or in both: where they fire, and the pictures that they fire for most.",
)
def domain_shift(
    images: Mapping[str, np.ndarray],
    activations: Mapping[str, np.ndarray],
    rows: Mapping[int, Shown],
    unit: str,
) -> Figure:
    """Fig. 4: two images of a class, their image-level activations, and exclusive and shared latents.

    Parameters
    ----------
    images, activations : picture and activation [S] by domain
    rows : by latent; its pictures are the masked images in the same order
    """
    colours = dict(zip(rows, cycle((BLUE, VERMILION, GREEN))))
    figure = plt.figure(figsize=(WIDTH, 1.6 * len(images) + 1.5 * len(rows)), layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=(1.6 * len(images), 1.5 * len(rows)))
    axes = upper.subplots(len(images), 2, width_ratios=(1, 3.6), squeeze=False)
    for line, (domain, image) in zip(axes, images.items(), strict=True):
        draw_pictures(line[:1], [image], [domain], wide=18)
        draw_lines(line[1], activations[domain], unit, colours)
    places = min(len(images) + max(len(shown.references) for shown in rows.values()), PLACES)
    axes = lower.subplots(len(rows), places, squeeze=False)
    for line, (latent, shown) in zip(axes, rows.items(), strict=True):
        draw_pictures(line[: len(images)], shown.pictures, list(images))
        draw_pictures(line[len(images) :], shown.references, shown.labels)
        line[0].set_title(shown.title, loc="left", color=colours[latent])
    return figure


class Layer(NamedTuple):
    """What one block's SAE sees (Fig. 9)."""

    title: str
    activation: np.ndarray  # [S] of the marked patch
    rows: Mapping[int, Shown]  # by latent, the strongest first
    atlas: xr.Dataset


@figure_of(
    "Fig. 9",
    caption="One patch, seen by the autoencoder of each block: which latents are active, how often "
    "and how strongly its latents fire, where the strongest fire, and the pictures that they "
    "fire for most.",
)
def layers(image: np.ndarray, box: tuple[float, float, float, float], blocks: Sequence[Layer]) -> Figure:
    """Fig. 9: per block the latents of one patch, references of the strongest, and the SAE's statistics."""
    high = [1.45 * max(len(layer.rows), 2) + 0.3 for layer in blocks]
    figure = plt.figure(figsize=(WIDTH, 1.7 + sum(high)), layout="constrained")
    top, *lines = figure.subfigures(len(blocks) + 1, 1, height_ratios=(1.7, *high))
    axis = top.subplots()
    draw_pictures([axis], [image], ["(a) input, the patch marked"], wide=40)
    axis.add_patch(Rectangle(box[:2], *box[2:], fill=False, ec=VERMILION, lw=1.6))
    for line, layer in zip(lines, blocks, strict=True):
        line.suptitle(layer.title, x=0.01, ha="left", weight="bold")
        left, right = line.subfigures(1, 2, width_ratios=(2.7, 4.3))
        marked = dict(zip(layer.rows, cycle((VERMILION, BLUE, GREEN))))
        upper, below = left.subplots(2, 1)
        draw_lines(upper, layer.activation, "at the patch", marked)
        alive = (layer.atlas.image_frequency > 0).values
        points = below.scatter(
            np.log10(layer.atlas.image_frequency.values[alive]),
            np.log10(layer.atlas.mean_activation.values[alive]),
            c=layer.atlas.entropy.values[alive], s=3, linewidths=0, rasterized=True,
        )  # fmt: skip
        below.set_xlabel("log10 frequency", fontsize=SMALL, labelpad=1)
        below.set_ylabel("log10 mean act.", fontsize=SMALL, labelpad=1)
        left.colorbar(points, ax=below).set_label("entropy (nat)", fontsize=SMALL)
        places = min(1 + max((len(shown.references) for shown in layer.rows.values()), default=0), 4)
        axes = right.subplots(max(len(layer.rows), 1), places, squeeze=False)
        draw_pictures(axes[0], [])  # where no latent is to be shown, an empty place
        for row, (latent, shown) in zip(axes[: len(layer.rows)], layer.rows.items(), strict=True):
            draw_pictures(row[:1], shown.pictures)
            draw_pictures(row[1:], shown.references, shown.labels, wide=14)
            row[0].set_title(shown.title, fontsize=SMALL, loc="left", color=marked[latent])
    return figure


@figure_of(
    "Fig. 13", "Fig. 18", "Fig. 19",
    caption="A row for each latent: where it fires in a picture, and on the right the pictures that "
    "it fires for most.",
)  # fmt: skip
def latent_rows(rows: Sequence[Shown], headings: Sequence[str]) -> Figure:
    """Fig. 13: a row per latent, its pictures under `headings` and then its references."""
    places = min(len(headings) + max(len(shown.references) for shown in rows), PLACES)
    figure = plt.figure(figsize=(WIDTH, 1.6 * len(rows)), layout="constrained")
    lines = np.atleast_1d(figure.subfigures(len(rows), 1))
    for line, shown in zip(lines, rows, strict=True):
        axes = line.subplots(1, places, squeeze=False)[0]
        draw_pictures(axes[: len(headings)], shown.pictures, headings, wide=13)
        draw_pictures(axes[len(headings) :], shown.references, shown.labels, wide=13)
        line.suptitle(folded(shown.title, 105), fontsize=9, x=0.01, ha="left")
    return figure


@figure_of(caption="What each way of looking scores on the same scenes. Bars are 95 % intervals.")
def score_intervals(scores: Mapping[str, Mapping[str, Interval]], unit: str) -> Figure:
    """Show scores with their intervals: groups along the axis, what is compared in colours."""
    names = len(next(iter(scores.values())))
    legend = -(-names // 3)
    size = (WIDTH, 0.7 + max(0.4, 0.14 * names) * len(scores) + 0.2 * legend)
    figure, axis = plt.subplots(figsize=size, layout="constrained")
    draw_intervals(axis, scores)
    axis.set(xlabel=unit, xlim=(0, 1))
    axis.legend(ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1))
    return figure
