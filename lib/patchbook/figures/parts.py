"""What several figures are made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure


def figure_of(*items: str) -> Callable[[Callable[..., Figure]], Callable[..., Figure]]:
    """Name the paper's figures that a function draws; none for a figure that the paper does not have."""

    def mark(function: Callable[..., Figure]) -> Callable[..., Figure]:
        function.figure_of = items
        return function

    return mark


class Shown(NamedTuple):
    """One latent, ready to be shown."""

    title: str
    pictures: Sequence[np.ndarray]
    """Input images, usually rendered with the latent's mask."""
    references: Sequence[np.ndarray]
    labels: Sequence[str]
    """Below each reference."""


def draw_pictures(axes: Sequence[Axes], pictures: Sequence[np.ndarray], labels: Sequence[str] = ()) -> None:
    for axis in axes:
        axis.axis("off")
    # a rare latent may have fewer references than there are places
    for axis, picture in zip(axes[: len(pictures)], pictures, strict=True):
        axis.imshow(picture)
    for axis, label in zip(axes[: len(labels)], labels, strict=True):
        axis.text(0.5, -0.04, label, transform=axis.transAxes, ha="center", va="top", fontsize=5.5)


def draw_lines(axis: Axes, activation: np.ndarray, unit: str, marked: Mapping[int, str]) -> None:
    """Draw activations over latent numbers, some marked in colours."""
    active = np.flatnonzero(activation > 0)
    axis.vlines(active, 0, activation[active], color="0.6", lw=0.7)
    for latent, colour in marked.items():
        if not activation[latent]:
            continue
        axis.vlines(latent, 0, activation[latent], color=colour, lw=1.6)
        axis.plot(latent, activation[latent], "o", ms=3.5, color=colour)
        # numbers at the right edge are written to the left of their line
        side = "right" if latent > 0.8 * len(activation) else "left"
        axis.annotate(
            str(latent), (latent, activation[latent]), xytext=(0, 3), textcoords="offset points",
            fontsize=6, color=colour, ha=side,
        )  # fmt: skip
    axis.set_xlim(0, len(activation))
    axis.margins(y=0.2)
    axis.set_ylim(bottom=0)
    axis.set_xlabel("latent", fontsize=6)
    axis.set_ylabel(unit, fontsize=6)
    axis.tick_params(labelsize=5)
