"""What several figures are made of: colours, sizes of text, pictures and intervals."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Okabe and Ito's palette: told apart by readers who see few colours, and in grey by lightness.
BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
YELLOW, BLUE, VERMILION, PURPLE = "#F0E442", "#0072B2", "#D55E00", "#CC79A7"
PALETTE = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, BLACK, YELLOW)
MARKS = ("o", "s", "^", "D", "v", "X", "P", "*")
"""Beside each colour of PALETTE, so that no series is told from another by colour alone."""

WIDTH = 7.0
"""Inches of the widest figure: the text column of a page."""
SMALL = 8
"""Points of the smallest text."""
STYLE = {
    "figure.figsize": (WIDTH, 4.0),
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.labelsize": 8.5,
    "xtick.labelsize": SMALL,
    "ytick.labelsize": SMALL,
    "legend.fontsize": SMALL,
    "legend.title_fontsize": SMALL,
    "figure.titlesize": 10,
    "image.cmap": "cividis",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.prop_cycle": cycler(color=PALETTE[:7], marker=MARKS[:7]),
    "lines.markersize": 4,
    "svg.fonttype": "none",
    "pdf.fonttype": 42,
}


class Shown(NamedTuple):
    """One latent, ready to be shown."""

    title: str
    pictures: Sequence[np.ndarray]
    """Input images, usually rendered with the latent's mask."""
    references: Sequence[np.ndarray]
    labels: Sequence[str]
    """Below each reference."""


def folded(text: str, wide: int, lines: int = 2) -> str:
    """Break a text into lines of at most `wide` characters; what does not fit ends in an ellipsis."""
    return textwrap.fill(text, wide, max_lines=lines, placeholder="…", break_long_words=True)


def grid_of(
    count: int, columns: int, width: float, ratio: float, extra: float = 0.0
) -> tuple[Figure, list]:
    """Make panels of one size in rows; return the figure and the axes of the `count` panels.

    `width` inches of a panel where there is room, `ratio` of its height to it, `extra` inches below all.
    """
    columns = min(columns, count)
    rows, width = -(-count // columns), min(width, WIDTH / columns)
    size = (width * columns, ratio * width * rows + extra)
    figure, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    for axis in axes.flat[count:]:
        axis.axis("off")
    return figure, list(axes.flat[:count])


def draw_pictures(
    axes: Sequence[Axes], pictures: Sequence[np.ndarray], labels: Sequence[str] = (), wide: int = 11
) -> None:
    """Draw pictures in the first axes, a label of at most two lines of `wide` letters below each."""
    for axis in axes:
        axis.axis("off")
    # a rare latent may have fewer references than there are places
    for axis, picture in zip(axes, pictures, strict=False):
        axis.imshow(picture)
    for axis, label in zip(axes, labels, strict=False):
        axis.text(
            0.5, -0.04, folded(label, wide), transform=axis.transAxes, ha="center", va="top", fontsize=SMALL
        )


def draw_lines(axis: Axes, activation: np.ndarray, unit: str, marked: Mapping[int, str]) -> None:
    """Draw activations over latent numbers, some marked in colours."""
    active = np.flatnonzero(activation > 0)
    axis.vlines(active, 0, activation[active], color="0.6", lw=0.7, label="all active latents")
    for (latent, colour), mark in zip(marked.items(), cycle(MARKS)):
        if not activation[latent]:
            continue
        axis.vlines(latent, 0, activation[latent], color=colour, lw=1.6, label=f"latent {latent}")
        axis.plot(latent, activation[latent], mark, ms=4, color=colour)
        # numbers at the right edge are written to the left of their line
        side = "right" if latent > 0.8 * len(activation) else "left"
        axis.annotate(
            str(latent), (latent, activation[latent]), xytext=(0, 3), textcoords="offset points",
            fontsize=SMALL, color=colour, ha=side,
        )  # fmt: skip
    axis.set_xlim(0, len(activation))
    axis.margins(y=0.25)
    axis.set_ylim(bottom=0)
    axis.set_xlabel("latent", fontsize=SMALL, labelpad=1)
    axis.set_ylabel(unit, fontsize=SMALL, labelpad=1)
    axis.locator_params(nbins=4)


def draw_intervals(axis: Axes, rows: Mapping[str, Mapping[str, tuple]], folds: int = 22) -> None:
    """Draw numbers with their intervals: a line per row, a colour and a mark for each name in it.

    A row holds (value, low, high) by name. Rows are separated by lines, as their names lie on the left.
    """
    names = list(next(iter(rows.values())))
    places = np.arange(len(rows))[::-1]
    for number, (name, colour, mark) in enumerate(zip(names, cycle(PALETTE), cycle(MARKS))):
        value, low, high = np.array([tuple(row[name]) for row in rows.values()], dtype=float).T
        shift = 0.7 / len(names) * ((len(names) - 1) / 2 - number)
        error = np.maximum(np.stack([value - low, high - value]), 0)
        axis.errorbar(
            value, places + shift, xerr=error, fmt=mark, ms=4.5, capsize=2, color=colour, label=name, lw=1.2
        )
    axis.set_yticks(places, [folded(name, folds) for name in rows])
    axis.set_ylim(-0.6, len(rows) - 0.4)
    for place in places[:-1]:
        axis.axhline(place - 0.5, color="0.85", lw=0.7)
    axis.tick_params(axis="y", length=0)
    axis.grid(alpha=0.3, axis="x")
