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

from patchbook.figures.parts import Shown, draw_lines, draw_pictures, figure_of
from patchsae.runs.intervals import Interval


class Level(NamedTuple):
    """What is active at one level: a patch, an image, a class, a data set (Fig. 2)."""

    title: str
    unit: str
    activation: np.ndarray  # [S]
    box: tuple[float, float, float, float] | None  # left, top, width, height of the patch, px
    latent: int
    shown: Shown


@figure_of("Fig. 2")
def analysis(image: np.ndarray, levels: Sequence[Level], headings: Sequence[str]) -> Figure:
    """Fig. 2: what is active in patches, image, class and data set, and the strongest latent of each.

    A row shows the level's activations, the references of its strongest latent and that latent's masks over
    the image; `headings` name the masks.
    """
    places = max(len(level.shown.references) for level in levels)
    width = [1, 2.2, *[1] * (places + len(headings))]
    figure, axes = plt.subplots(
        len(levels), len(width), figsize=(1.05 * sum(width), 1.5 * len(levels)), layout="constrained",
        squeeze=False, gridspec_kw={"width_ratios": width},
    )  # fmt: skip
    for line, level in zip(axes, levels, strict=True):
        draw_pictures(line[:1], [image], [level.title])
        if level.box:
            left, top, wide, high = level.box
            line[0].add_patch(Rectangle((left, top), wide, high, fill=False, ec="crimson", lw=1.4))
        draw_lines(line[1], level.activation, level.unit, {level.latent: "crimson"})
        draw_pictures(line[2 : 2 + places], level.shown.references, level.shown.labels)
        draw_pictures(line[2 + places :], level.shown.pictures)
        line[2].set_title(level.shown.title, fontsize=7, loc="left")
    for axis, heading in zip(axes[0, 2 + places :], headings, strict=True):
        axis.set_title(heading, fontsize=7)
    return figure


@figure_of("Fig. 4")
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
    colours = dict(zip(rows, cycle(("tab:blue", "tab:orange", "tab:green"))))
    figure = plt.figure(figsize=(12.5, 1.75 * len(rows)), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1, 1.75))
    axes = left.subplots(len(images), 2, width_ratios=(1, 2), squeeze=False)
    for line, (domain, image) in zip(axes, images.items(), strict=True):
        draw_pictures(line[:1], [image], [domain])
        draw_lines(line[1], activations[domain], unit, colours)
    places = len(images) + max(len(shown.references) for shown in rows.values())
    axes = right.subplots(len(rows), places, squeeze=False)
    for line, (latent, shown) in zip(axes, rows.items(), strict=True):
        draw_pictures(line[: len(images)], shown.pictures, list(images))
        draw_pictures(line[len(images) :], shown.references, shown.labels)
        line[0].set_title(shown.title, fontsize=7.5, loc="left", color=colours[latent])
    return figure


class Layer(NamedTuple):
    """What one block's SAE sees (Fig. 9)."""

    title: str
    activation: np.ndarray  # [S] of the marked patch
    rows: Mapping[int, Shown]  # by latent, the strongest first
    atlas: xr.Dataset


@figure_of("Fig. 9")
def layers(image: np.ndarray, box: tuple[float, float, float, float], blocks: Sequence[Layer]) -> Figure:
    """Fig. 9: per block the latents of one patch, references of the strongest, and the SAE's statistics."""
    figure = plt.figure(figsize=(12.5, 3.4 * len(blocks) + 1.5), layout="constrained")
    top, *lines = figure.subfigures(len(blocks) + 1, 1, height_ratios=(1.5, *[3.4] * len(blocks)))
    axis = top.subplots()
    draw_pictures([axis], [image], ["(a) input, the patch marked"])
    axis.add_patch(Rectangle(box[:2], *box[2:], fill=False, ec="crimson", lw=1.6))
    for line, layer in zip(lines, blocks, strict=True):
        left, middle, right = line.subfigures(1, 3, width_ratios=(1.1, 1.9, 1.1))
        marked = dict(zip(layer.rows, cycle(("crimson", "tab:blue", "tab:green"))))
        axis = left.subplots()
        draw_lines(axis, layer.activation, "activation at the patch", marked)
        axis.set_title(layer.title, fontsize=9, loc="left")
        places = 1 + max((len(shown.references) for shown in layer.rows.values()), default=0)
        axes = middle.subplots(max(len(layer.rows), 1), places, squeeze=False)
        draw_pictures(axes[0], [])  # where no latent is to be shown, an empty place
        for row, (latent, shown) in zip(axes[: len(layer.rows)], layer.rows.items(), strict=True):
            draw_pictures(row[:1], shown.pictures)
            draw_pictures(row[1:], shown.references, shown.labels)
            row[0].set_title(shown.title, fontsize=6.5, loc="left", color=marked[latent])
        alive = (layer.atlas.frequency > 0).values
        axis = right.subplots()
        points = axis.scatter(
            np.log10(layer.atlas.frequency.values[alive]),
            np.log10(layer.atlas.mean_activation.values[alive]),
            c=layer.atlas.entropy.values[alive], s=3, cmap="viridis", linewidths=0,
        )  # fmt: skip
        axis.set_xlabel("log10 activated frequency (share of images)", fontsize=6)
        axis.set_ylabel("log10 mean activation", fontsize=6)
        axis.tick_params(labelsize=5)
        bar = right.colorbar(points, ax=axis)
        bar.set_label("label entropy (nat)", fontsize=6)
        bar.ax.tick_params(labelsize=5)
    return figure


@figure_of("Fig. 13", "Fig. 18", "Fig. 19")
def latent_rows(rows: Sequence[Shown], headings: Sequence[str]) -> Figure:
    """Fig. 13: a row per latent, its pictures under `headings` and then its references."""
    places = len(headings) + max(len(shown.references) for shown in rows)
    figure, axes = plt.subplots(
        len(rows), places, figsize=(1.3 * places, 1.6 * len(rows)), layout="constrained", squeeze=False
    )
    for line, shown in zip(axes, rows, strict=True):
        draw_pictures(line[: len(headings)], shown.pictures, headings)
        draw_pictures(line[len(headings) :], shown.references, shown.labels)
        line[0].set_title(shown.title, fontsize=7, loc="left")
    return figure


@figure_of()
def score_intervals(scores: Mapping[str, Mapping[str, Interval]], unit: str) -> Figure:
    """Show scores with their intervals: groups along the axis, what is compared in colours."""
    figure, axis = plt.subplots(figsize=(1.6 * len(scores) + 4, 3.6), layout="constrained")
    names = list(next(iter(scores.values())))
    for number, name in enumerate(names):
        place = np.arange(len(scores)) + (number - (len(names) - 1) / 2) * 0.12
        value, low, high = np.array([group[name] for group in scores.values()]).T
        axis.errorbar(place, value, (value - low, high - value), fmt="o", ms=4, capsize=2, label=name)
    axis.set_xticks(np.arange(len(scores)), list(scores))
    axis.set(ylabel=unit, ylim=(0, 1))
    axis.grid(alpha=0.3, axis="y")
    axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure
