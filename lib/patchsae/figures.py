"""One function per figure: takes results, returns a matplotlib figure, computes nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from .evaluation import Interval


def training_curves(metrics: Sequence[Mapping[str, float]], title: str = "") -> Figure:
    """Show how reconstruction, sparsity and dead latents develop with the tokens seen (§3.1)."""
    tokens = np.array([row["tokens"] for row in metrics]) / 1e6
    panels = (
        ("mse", "MSE / ‖x‖ (unit of Table 2)", "log"),
        ("fvu", "unexplained variance (FVU)", "log"),
        ("l0", "active latents per token (L0)", "log"),
        ("dead_share", "share of dead latents", "linear"),
    )
    figure, axes = plt.subplots(1, 4, figsize=(14, 3.2), layout="constrained")
    for axis, (key, label, scale) in zip(axes, panels, strict=True):
        axis.plot(tokens, [row[key] for row in metrics], lw=1.2)
        axis.set(xlabel="tokens seen (million)", ylabel=label, yscale=scale)
        axis.grid(alpha=0.3)
    figure.suptitle(title)
    return figure


def learning_curve(rows: Sequence[Mapping[str, float]], domains: Sequence[str], chance: float) -> Figure:
    """Show the small CLIP's zero-shot accuracy on held-out scenes against the images it has seen."""
    figure, axis = plt.subplots(figsize=(6, 3.4), layout="constrained")
    images = np.array([row["images"] for row in rows]) / 1e3
    for domain in domains:
        axis.plot(images, [100 * row[f"{domain}_concept"] for row in rows], marker="o", ms=3, label=domain)
    axis.axhline(100 * chance, color="0.5", ls=":", label="chance")
    axis.set(xlabel="images seen (thousand)", ylabel="zero-shot top-1 (%)", ylim=(0, 100))
    axis.grid(alpha=0.3)
    axis.legend()
    return figure


def image_row(images: Sequence[np.ndarray], titles: Sequence[str], columns: int = 8) -> Figure:
    """Show images [H, W, 3] in a grid with a title above each."""
    rows = -(-len(images) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(1.6 * columns, 1.85 * rows), layout="constrained", squeeze=False
    )
    for axis in axes.flat:
        axis.axis("off")
    for axis, image, title in zip(axes.flat[: len(images)], images, titles, strict=True):
        axis.imshow(image)
        axis.set_title(title, fontsize=7)
    return figure


def statistics_scatter(atlas: xr.Dataset, marked: Mapping[str, int] | None = None) -> Figure:
    """Fig. 3, left: log10 frequency against log10 mean activation, coloured by label entropy."""
    alive = (atlas.frequency > 0).values
    x = np.log10(atlas.frequency.values[alive])
    y = np.log10(atlas.mean_activation.values[alive])
    figure = plt.figure(figsize=(7, 6), layout="constrained")
    grid = figure.add_gridspec(2, 2, width_ratios=(4, 1), height_ratios=(1, 4))
    axis = figure.add_subplot(grid[1, 0])
    top, right = figure.add_subplot(grid[0, 0], sharex=axis), figure.add_subplot(grid[1, 1], sharey=axis)
    points = axis.scatter(x, y, c=atlas.entropy.values[alive], s=6, cmap="viridis", linewidths=0)
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
        place = (np.log10(atlas.frequency.values[latent]), np.log10(atlas.mean_activation.values[latent]))
        axis.plot(*place, "o", ms=11, mfc="none", mec="crimson", mew=1.6)
        axis.annotate(
            name, place, xytext=(7, 7), textcoords="offset points", color="crimson", weight="bold"
        )
    return figure


def reference_images(rows: Mapping[str, tuple[Sequence[np.ndarray], Sequence[str]]]) -> Figure:
    """Fig. 3, right: one row of reference images per latent, the label below each."""
    columns = max(len(images) for images, _ in rows.values())
    figure = plt.figure(figsize=(1.3 * columns, 1.95 * len(rows)), layout="constrained")
    lines = np.atleast_1d(figure.subfigures(len(rows), 1))
    for line, (name, (images, labels)) in zip(lines, rows.items(), strict=True):
        line.suptitle(name, fontsize=9, x=0.01, ha="left")
        axes = line.subplots(1, columns, squeeze=False)[0]
        _pictures(axes, images, labels)
    return figure


def purity_histogram(observed: np.ndarray, null: np.ndarray) -> Figure:
    """Show the share of the commonest label among references against the permutation null."""
    figure, axis = plt.subplots(figsize=(6, 3.2), layout="constrained")
    axis.hist(observed, bins=np.linspace(0, 1, 22), color="tab:blue", alpha=0.75, label="latents")
    axis.axvline(observed.mean(), color="tab:blue", lw=2, label=f"mean {observed.mean():.2f}")
    axis.axvline(null.mean(), color="0.3", ls="--", label=f"mean, labels permuted {null.mean():.2f}")
    axis.set(xlabel="share of the commonest label among the references", ylabel="latents")
    axis.legend()
    return figure


def mass_scatter(area: np.ndarray, mass: np.ndarray, area_share: float, mass_share: float) -> Figure:
    """Show each latent's activation mass inside objects against the area they cover."""
    figure, axis = plt.subplots(figsize=(5, 4), layout="constrained")
    axis.scatter(area, mass, s=6, alpha=0.5, linewidths=0)
    axis.plot([0, 1], [0, 1], color="0.5", ls=":", label="no preference for objects")
    axis.plot(area_share, mass_share, "X", ms=11, color="crimson", label="all latents together")
    axis.set(
        xlabel="area covered by objects where the latent fires (share)",
        ylabel="activation mass inside objects (share)",
        xlim=(0, 1),
        ylim=(0, 1),
    )
    axis.legend()
    return figure


def dead_latents(runs: Mapping[str, Sequence[Mapping[str, float]]]) -> Figure:
    """Show the share of dead latents over the steps of several runs (footnote 5)."""
    figure, axis = plt.subplots(figsize=(6, 3.2), layout="constrained")
    for name, metrics in runs.items():
        steps = [row["step"] for row in metrics]
        axis.plot(steps, [100 * row["dead_share"] for row in metrics], lw=1.2, label=name)
    axis.set(xlabel="step", ylabel="dead latents (%)", ylim=(0, None))
    axis.grid(alpha=0.3)
    axis.legend()
    return figure


def activation_histograms(atlas: xr.Dataset, latents: Mapping[str, int]) -> Figure:
    """Show how the log activations of the active tokens of some latents are distributed."""
    figure, axis = plt.subplots(figsize=(6, 3.2), layout="constrained")
    edges = atlas.bin.values[:-1]
    for name, latent in latents.items():
        counts = atlas.histogram.values[latent]
        axis.stairs(counts[1:-1] / max(counts.sum(), 1), edges, label=f"({name}) latent {latent}")
    axis.set(xlabel="log10 activation of a token", ylabel="share of the active tokens")
    axis.legend()
    return figure


def co_activation_map(share: np.ndarray, latents: Sequence[int]) -> Figure:
    """Show which share of a latent's images [n, n] each other latent is active in too."""
    figure, axis = plt.subplots(figsize=(6, 5), layout="constrained")
    picture = axis.imshow(share, vmin=0, vmax=1, cmap="magma")
    ticks = np.arange(len(latents))
    axis.set_xticks(ticks, latents, rotation=90, fontsize=5)
    axis.set_yticks(ticks, latents, fontsize=5)
    axis.set(xlabel="also among the strongest: latent", ylabel="among an image's strongest: latent")
    figure.colorbar(picture, ax=axis, label="share of images")
    return figure


def reference_matrix(
    cells: Sequence[Sequence[tuple[np.ndarray | None, str]]], rows: Sequence[str], columns: Sequence[str]
) -> Figure:
    """Fig. 14: one reference image per latent (row) and data set (column), statistics below each."""
    figure, axes = plt.subplots(
        len(rows), len(columns), figsize=(1.25 * len(columns), 1.5 * len(rows)), layout="constrained",
        squeeze=False,
    )  # fmt: skip
    for line, row, name in zip(axes, cells, rows, strict=True):
        for axis, (image, text) in zip(line, row, strict=True):
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
            if image is not None:
                axis.imshow(image)
            axis.set_xlabel(text, fontsize=5.5, labelpad=2)
        line[0].set_ylabel(name, fontsize=5.5)
    for axis, name in zip(axes[0], columns, strict=True):
        axis.set_title(name, fontsize=6)
    return figure


class Shown(NamedTuple):
    """One latent, ready to be shown."""

    title: str
    pictures: Sequence[np.ndarray]
    """Input images, usually rendered with the latent's mask."""
    references: Sequence[np.ndarray]
    labels: Sequence[str]
    """Below each reference."""


class Level(NamedTuple):
    """What is active at one level: a patch, an image, a class, a data set (Fig. 2)."""

    title: str
    unit: str
    activation: np.ndarray  # [S]
    box: tuple[float, float, float, float] | None  # left, top, width, height of the patch, px
    latent: int
    shown: Shown


def _pictures(axes: Sequence[Axes], pictures: Sequence[np.ndarray], labels: Sequence[str] = ()) -> None:
    for axis in axes:
        axis.axis("off")
    # a rare latent may have fewer references than there are places
    for axis, picture in zip(axes[: len(pictures)], pictures, strict=True):
        axis.imshow(picture)
    for axis, label in zip(axes[: len(labels)], labels, strict=True):
        axis.text(0.5, -0.04, label, transform=axis.transAxes, ha="center", va="top", fontsize=5.5)


def _lines(axis: Axes, activation: np.ndarray, unit: str, marked: Mapping[int, str]) -> None:
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
        _pictures(line[:1], [image], [level.title])
        if level.box:
            left, top, wide, high = level.box
            line[0].add_patch(Rectangle((left, top), wide, high, fill=False, ec="crimson", lw=1.4))
        _lines(line[1], level.activation, level.unit, {level.latent: "crimson"})
        _pictures(line[2 : 2 + places], level.shown.references, level.shown.labels)
        _pictures(line[2 + places :], level.shown.pictures)
        line[2].set_title(level.shown.title, fontsize=7, loc="left")
    for axis, heading in zip(axes[0, 2 + places :], headings, strict=True):
        axis.set_title(heading, fontsize=7)
    return figure


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
        _pictures(line[:1], [image], [domain])
        _lines(line[1], activations[domain], unit, colours)
    places = len(images) + max(len(shown.references) for shown in rows.values())
    axes = right.subplots(len(rows), places, squeeze=False)
    for line, (latent, shown) in zip(axes, rows.items(), strict=True):
        _pictures(line[: len(images)], shown.pictures, list(images))
        _pictures(line[len(images) :], shown.references, shown.labels)
        line[0].set_title(shown.title, fontsize=7.5, loc="left", color=colours[latent])
    return figure


class Layer(NamedTuple):
    """What one block's SAE sees (Fig. 9)."""

    title: str
    activation: np.ndarray  # [S] of the marked patch
    rows: Mapping[int, Shown]  # by latent, the strongest first
    atlas: xr.Dataset


def layers(image: np.ndarray, box: tuple[float, float, float, float], blocks: Sequence[Layer]) -> Figure:
    """Fig. 9: per block the latents of one patch, references of the strongest, and the SAE's statistics."""
    figure = plt.figure(figsize=(12.5, 3.4 * len(blocks) + 1.5), layout="constrained")
    top, *lines = figure.subfigures(len(blocks) + 1, 1, height_ratios=(1.5, *[3.4] * len(blocks)))
    axis = top.subplots()
    _pictures([axis], [image], ["(a) input, the patch marked"])
    axis.add_patch(Rectangle(box[:2], *box[2:], fill=False, ec="crimson", lw=1.6))
    for line, layer in zip(lines, blocks, strict=True):
        left, middle, right = line.subfigures(1, 3, width_ratios=(1.1, 1.9, 1.1))
        marked = dict(zip(layer.rows, cycle(("crimson", "tab:blue", "tab:green"))))
        axis = left.subplots()
        _lines(axis, layer.activation, "activation at the patch", marked)
        axis.set_title(layer.title, fontsize=9, loc="left")
        places = 1 + max((len(shown.references) for shown in layer.rows.values()), default=0)
        axes = middle.subplots(max(len(layer.rows), 1), places, squeeze=False)
        _pictures(axes[0], [])  # where no latent is to be shown, an empty place
        for row, (latent, shown) in zip(axes[: len(layer.rows)], layer.rows.items(), strict=True):
            _pictures(row[:1], shown.pictures)
            _pictures(row[1:], shown.references, shown.labels)
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


def latent_rows(rows: Sequence[Shown], headings: Sequence[str]) -> Figure:
    """Fig. 13: a row per latent, its pictures under `headings` and then its references."""
    places = len(headings) + max(len(shown.references) for shown in rows)
    figure, axes = plt.subplots(
        len(rows), places, figsize=(1.3 * places, 1.6 * len(rows)), layout="constrained", squeeze=False
    )
    for line, shown in zip(axes, rows, strict=True):
        _pictures(line[: len(headings)], shown.pictures, headings)
        _pictures(line[len(headings) :], shown.references, shown.labels)
        line[0].set_title(shown.title, fontsize=7, loc="left")
    return figure


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
