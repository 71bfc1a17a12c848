"""Fig. 1: the whole method on one image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from patchbook.figures.parts import PALETTE, SMALL, VERMILION, WIDTH, folded
from patchbook.figures.showing import figure_of


class OneImage(NamedTuple):
    """One image on its way through the model and the autoencoder."""

    picture: np.ndarray
    """[H, W, 3]."""
    grid: tuple[int, int]
    """Rows and columns of patches."""
    stream: np.ndarray
    """Residual stream [T, d]."""
    latents: np.ndarray
    """Activations of the latents that are shown [T, n]."""
    rebuilt: np.ndarray
    """The stream as the autoencoder rebuilds it [T, d]."""
    masks: Mapping[str, np.ndarray]
    """The picture through the map of each of a few latents, by title."""
    answers: Mapping[str, Sequence[float]]
    """Probability of each class by model: of the model itself, and with the stream rebuilt."""
    classes: Sequence[str]
    """Names of these classes."""


@figure_of(
    "Fig. 1",
    caption="(a) The tokens of an image are rewritten as few latents and rebuilt from them. (b) A "
    "latent is active somewhere in the picture. (c) The model's answer through the rebuilt "
    "tokens, beside its own.",
)
def overview(shown: OneImage, steps: Sequence[str]) -> Figure:
    """Fig. 1: (a) tokens are rebuilt from latents; (b) latents have a place; (c) and an effect.

    `steps` names the three arrows of (a). Numbers of the stream are red above zero and blue below,
    those of the latents bright where active.
    """
    figure = plt.figure(figsize=(WIDTH, 4.6), layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=(1.25, 1))
    heading = {"fontsize": 10, "ha": "left"}
    upper.suptitle("(a) every token of an image is rebuilt from a few latents", x=0.01, **heading)
    axes = upper.subplots(1, 4)
    height, width = shown.picture.shape[:2]
    axes[0].imshow(shown.picture)
    for count, size, line in zip(
        shown.grid, (height, width), (axes[0].hlines, axes[0].vlines), strict=True
    ):
        line(np.linspace(0, size, count + 1)[1:-1] - 0.5, -0.5, size - 0.5, color="w", lw=0.5)
    axes[0].set_title("image\n(cut in patches)", fontsize=SMALL)
    limit = np.quantile(np.abs(shown.stream), 0.99)
    colours = {"cmap": "RdBu_r", "vmin": -limit, "vmax": limit}
    signs, count = "red +, blue −", shown.latents.shape[1]
    drawn = {
        f"residual stream\n({signs})": (shown.stream, "dimension", colours),
        "latents\n(bright = active)": (shown.latents, f"{count} strongest", {"cmap": "magma"}),
        f"rebuilt stream\n({signs})": (shown.rebuilt, "dimension", colours),
    }
    for axis, (title, (values, unit, style)) in zip(axes[1:], drawn.items(), strict=True):
        axis.imshow(values, aspect="auto", interpolation="nearest", **style)
        axis.set_title(title, fontsize=SMALL)
        axis.set_xlabel(unit, fontsize=SMALL)
        axis.locator_params(nbins=3)
    axes[1].set_ylabel("token", loc="bottom", fontsize=SMALL)
    axes[0].set(xticks=[], yticks=[])
    for axis in axes:
        axis.set_box_aspect(1)
    # The arrows stand between the panels.
    upper.get_layout_engine().set(wspace=0.12)
    for axis, step in zip(axes[1:], steps, strict=True):
        axis.annotate(
            f"{folded(step, 8)}\n⟶",
            (-0.42, 0.5), xycoords="axes fraction", fontsize=SMALL, ha="center", va="center",
            color=VERMILION,
        )  # fmt: skip
    left, right = lower.subfigures(1, 2, width_ratios=(1.5, 1))
    left.suptitle("(b) a latent is active somewhere", x=0.015, **heading)
    for axis, (title, picture) in zip(
        left.subplots(1, len(shown.masks), squeeze=False)[0], shown.masks.items(), strict=True
    ):
        axis.imshow(picture)
        axis.set_title(title, fontsize=SMALL)
        axis.axis("off")
    right.suptitle("(c) and the answer rests on it", x=0.02, **heading)
    axis = right.subplots()
    places, bar = np.arange(len(shown.classes)), 0.8 / len(shown.answers)
    for number, ((name, values), colour) in enumerate(zip(shown.answers.items(), cycle(PALETTE))):
        place = places + (number - (len(shown.answers) - 1) / 2) * bar
        axis.barh(place, values, bar, label=name, color=colour)
    axis.set_yticks(places, [folded(name, 16) for name in shown.classes])
    axis.invert_yaxis()
    axis.set_xlabel("probability of the class", fontsize=SMALL)
    axis.legend(loc="lower right")
    return figure
