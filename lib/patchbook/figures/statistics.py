"""Figures of what latents respond to (Fig. 3, 10, 14)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle

import matplotlib.pyplot as plt
import numpy as np
import xarray as xr
from matplotlib.figure import Figure

from patchbook.figures.parts import (
    BLUE,
    PALETTE,
    SMALL,
    VERMILION,
    WIDTH,
    draw_pictures,
    folded,
)
from patchbook.figures.showing import figure_of


@figure_of(
    "Fig. 3", "Fig. 11",
    caption="Each point is a latent: how often it fires against how strongly, coloured by how spread "
    "the labels of its images are. Above and beside, how many latents lie there.",
)  # fmt: skip
def statistics_scatter(
    atlas: xr.Dataset, marked: Mapping[str, int] | None = None, title: str = ""
) -> Figure:
    """Fig. 3, left: log10 frequency against log10 mean activation, coloured by label entropy."""
    alive = (atlas.image_frequency > 0).values
    x = np.log10(atlas.image_frequency.values[alive])
    y = np.log10(atlas.mean_activation.values[alive])
    figure = plt.figure(figsize=(6.4, 5.2), layout="constrained")
    grid = figure.add_gridspec(2, 2, width_ratios=(4, 1), height_ratios=(1, 4))
    axis = figure.add_subplot(grid[1, 0])
    top, right = figure.add_subplot(grid[0, 0], sharex=axis), figure.add_subplot(grid[1, 1], sharey=axis)
    points = axis.scatter(x, y, c=atlas.entropy.values[alive], s=6, linewidths=0, rasterized=True)
    axis.set(
        xlabel="log10 activated frequency (share of images)",
        ylabel="log10 mean activation (image mean over active images)",
    )
    top.hist(x, bins=60, color="0.6")
    right.hist(y, bins=60, color="0.6", orientation="horizontal")
    top.set_ylabel("latents")
    right.set_xlabel("latents")
    top.tick_params(labelbottom=False)
    right.tick_params(labelleft=False)
    figure.colorbar(points, ax=right, label="label entropy (nat)", fraction=0.5)
    for name, latent in (marked or {}).items():
        place = (
            np.log10(atlas.image_frequency.values[latent]),
            np.log10(atlas.mean_activation.values[latent]),
        )
        axis.plot(*place, "o", ms=11, mfc="none", mec=VERMILION, mew=1.6, label=f"({name}) latent {latent}")
        axis.annotate(
            name, place, xytext=(7, 7), textcoords="offset points", color=VERMILION, weight="bold"
        )
    return figure


@figure_of(
    "Fig. 3", "Fig. 6", "Fig. 10",
    caption="For each latent the images on which it is strongest, the first on the left, with their "
    "labels.",
)  # fmt: skip
def reference_images(rows: Mapping[str, tuple[Sequence[np.ndarray], Sequence[str]]]) -> Figure:
    """Fig. 3, right: one row of reference images per latent, the label below each."""
    counts = [max(len(images), 1) for images, _ in rows.values()]
    columns = min(max(counts), 8)  # eight beside one another leave room for a label
    columns = max(-(-max(counts) // -(-max(counts) // columns)), 6)
    deep = [-(-count // columns) for count in counts]
    high = [0.3 + (WIDTH / columns + 0.3) * lines for lines in deep]
    figure = plt.figure(figsize=(WIDTH, sum(high)), layout="constrained")
    lines = np.atleast_1d(figure.subfigures(len(rows), 1, height_ratios=high))
    for line, rows_of, (name, (images, labels)) in zip(lines, deep, rows.items(), strict=True):
        line.suptitle(folded(name, 100), fontsize=9, x=0.01, ha="left")
        axes = line.subplots(rows_of, columns, squeeze=False).ravel()
        draw_pictures(axes, images, labels, wide=12 if columns > 6 else 15)
    return figure


@figure_of(
    caption="How often the images of a latent carry the same label, against labels dealt at random: "
    "the further right, the purer."
)
def purity_histogram(observed: np.ndarray, null: np.ndarray) -> Figure:
    """Show the share of the commonest label among references against the permutation null."""
    figure, axis = plt.subplots(figsize=(6, 3.2), layout="constrained")
    axis.hist(observed, bins=np.linspace(0, 1, 22), color=BLUE, alpha=0.75, label="latents")
    axis.axvline(observed.mean(), color=BLUE, lw=2, marker="", label=f"mean {observed.mean():.2f}")
    axis.axvline(
        null.mean(), color="0.3", ls="--", marker="", label=f"mean, labels permuted {null.mean():.2f}"
    )
    axis.set(xlabel="share of the commonest label among the references", ylabel="latents")
    axis.legend()
    return figure


@figure_of(
    caption="Each point is a latent: above the dotted line it is more active inside objects than an "
    "even spread would be."
)
def mass_scatter(
    expected: np.ndarray, mass: np.ndarray, expected_share: float, mass_share: float
) -> Figure:
    """Show the share of each latent's activation inside objects against that of an even spread."""
    figure, axis = plt.subplots(figsize=(5.6, 4.2), layout="constrained")
    axis.scatter(expected, mass, s=6, color=BLUE, alpha=0.5, linewidths=0, label="latents", rasterized=True)
    axis.plot([0, 1], [0, 1], color="0.5", ls=":", marker="", label="no preference for objects")
    axis.plot(expected_share, mass_share, "X", ms=11, color=VERMILION, label="all latents together")
    axis.set(
        xlabel="inside objects if spread evenly over the same images (share)",
        ylabel="activation mass inside objects (share)",
        xlim=(0, 1),
        ylim=(0, 1),
    )
    axis.legend()
    return figure


@figure_of(caption="How strong some latents are where they are active at all.")
def activation_histograms(atlas: xr.Dataset, latents: Mapping[str, int]) -> Figure:
    """Show how the log activations of the active tokens of some latents are distributed."""
    figure, axis = plt.subplots(figsize=(6, 3.2), layout="constrained")
    edges = atlas.bin.values[:-1]
    step = edges[1] - edges[0]
    edges = [edges[0] - step, *edges, edges[-1] + step]
    for (name, latent), colour, line in zip(latents.items(), cycle(PALETTE), cycle(("-", "--", ":", "-."))):
        counts = atlas.histogram.values[latent]
        share = counts / max(counts.sum(), 1)
        axis.stairs(share, edges, label=f"({name}) latent {latent}", color=colour, ls=line, lw=1.5)
    axis.set(
        xlabel="log10 activation of a token (outermost bins: all below, all above)",
        ylabel="share of the active tokens",
    )
    axis.legend()
    return figure


@figure_of(
    caption="Which of the commonest latents are strong in the same images: bright cells are frequent pairs."
)
def co_activation_map(share: np.ndarray, latents: Sequence[int]) -> Figure:
    """Show which share of a latent's images [n, n] each other latent is active in too."""
    figure, axis = plt.subplots(figsize=(WIDTH, 6), layout="constrained")
    picture = axis.imshow(share, vmin=0, vmax=1, cmap="magma")
    ticks = np.arange(len(latents))
    axis.set_xticks(ticks, latents, rotation=90)
    axis.set_yticks(ticks, latents)
    axis.set(xlabel="also among the strongest: latent", ylabel="among an image's strongest: latent")
    figure.colorbar(picture, ax=axis, label="share of images")
    return figure


@figure_of(
    "Fig. 14",
    caption="Each row is the latent typical of one data set, each column a data set: the image there "
    "on which it is strongest. f: log10 frequency; a: log10 mean activation; e: label "
    "entropy in nat.",
)
def reference_matrix(
    cells: Sequence[Sequence[tuple[np.ndarray | None, str]]], rows: Sequence[str], columns: Sequence[str]
) -> Figure:
    """Fig. 14: one reference image per latent (row) and data set (column), statistics below each."""
    figure, axes = plt.subplots(
        len(rows), len(columns), figsize=(WIDTH, 1.0 * len(rows) + 1.0), layout="constrained", squeeze=False
    )
    for line, row, name in zip(axes, cells, rows, strict=True):
        for axis, (image, text) in zip(line, row, strict=True):
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
            if image is not None:
                axis.imshow(image)
            # a line for each number: beside one another they would be wider than the picture
            axis.set_xlabel(text.replace(", ", "\n"), fontsize=SMALL, labelpad=1)
        line[0].set_ylabel(
            folded(name, 12, 3), fontsize=SMALL, rotation=0, ha="right", va="center", labelpad=2
        )
    for axis, name in zip(axes[0], columns, strict=True):
        axis.set_title(folded(name, 12), fontsize=SMALL, rotation=90, va="bottom")
    figure.get_layout_engine().set(w_pad=0.01, h_pad=0.02, wspace=0, hspace=0)
    return figure


@figure_of(
    caption="How much of each dictionary the known levels of a scene explain (left), by which factor "
    "(right), and which change of a scene moves its clearest latents (below)."
)
def known_truth(
    shares: Mapping[str, tuple[float, float, float]],
    found: Mapping[str, float],
    factors: Mapping[str, int],
    moved: np.ndarray,
    owner: Sequence[str],
) -> Figure:
    """Show how much of each dictionary known levels explain, by which factors, and what moves its latents.

    Parameters
    ----------
    shares : explained share of each dictionary's units with its interval
    found : share of the levels that the best unit of each tells; may have more names
    factors : explained latents of the SAE by factor
    moved : [factors, n], share of what moves each of n latents
    owner : factor of each of these latents' level; equal ones stand together
    """
    figure = plt.figure(figsize=(WIDTH, 5.8), layout="constrained")
    grid = figure.add_gridspec(2, 2, height_ratios=(1.1, 1), width_ratios=(1.5, 1))
    left, right, below = (figure.add_subplot(g) for g in (grid[0, 0], grid[0, 1], grid[1, :]))
    for y, (name, share) in enumerate(found.items()):
        told = f"{name}: levels told"
        left.plot(100 * share, y + 0.16, "D", ms=6, mfc="none", color=VERMILION, label=told)
        written = [(y + 0.16, 100 * share, 100 * share, VERMILION)]
        if name in shares:
            value, low, high = (100 * v for v in shares[name])
            left.errorbar(
                value, y - 0.16, xerr=[[value - low], [high - value]], fmt="o", color=BLUE, capsize=3,
                label=f"{name}: units explained",
            )  # fmt: skip
            written.append((y - 0.16, value, high, BLUE))
        for height, value, end, colour in written:
            left.annotate(
                f"{value:.0f} %", (end, height), xytext=(8, 0), textcoords="offset points", va="center",
                fontsize=SMALL, color=colour,
            )  # fmt: skip
    left.set_yticks(range(len(found)), [folded(name, 16) for name in found])
    left.set(xlim=(0, 112), ylim=(len(found) - 0.4, -1.1), xlabel="share (%)")
    left.set_xticks(range(0, 101, 25))
    left.text(1, -0.75, "● units explained", color=BLUE, fontsize=SMALL, va="center")
    left.text(60, -0.75, "◇ levels told", color=VERMILION, fontsize=SMALL, va="center")
    bars = right.barh(list(factors), list(factors.values()), color=BLUE)
    right.bar_label(bars, padding=2, fontsize=SMALL)
    right.invert_yaxis()
    right.margins(x=0.2)
    right.set_xlabel("explained latents, trained SAE")
    picture = below.imshow(moved, aspect="auto", cmap="magma", vmin=0, interpolation="nearest")
    below.set_yticks(range(len(factors)), list(factors))
    edges = [i for i in range(1, len(owner)) if owner[i] != owner[i - 1]]
    for edge in edges:
        below.axvline(edge - 0.5, color="white", lw=1.5, marker="")
    starts = [0, *edges, len(owner)]
    middles = [(a + b - 1) / 2 for a, b in zip(starts[:-1], starts[1:], strict=True)]
    below.set_xticks(middles, [owner[start] for start in starts[:-1]])
    below.set(xlabel="clearest latents, by the factor of their best level", ylabel="changed factor")
    figure.colorbar(picture, ax=below, label="share of the movement", fraction=0.03, pad=0.01)
    return figure
