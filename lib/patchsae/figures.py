"""One function per figure: takes results, returns a matplotlib figure, computes nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import xarray as xr
from matplotlib.figure import Figure


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
    # not strict: the last row may have places left over
    for axis, image, title in zip(axes.flat, images, titles, strict=False):
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
        for axis in axes:
            axis.axis("off")
        # not strict: a rare latent may have fewer references than the others
        for axis, image, label in zip(axes, images, labels, strict=False):
            axis.imshow(image)
            axis.text(0.5, -0.04, label, transform=axis.transAxes, ha="center", va="top", fontsize=6)
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
            axis.set_xlabel(text, fontsize=4.5, labelpad=2)
        line[0].set_ylabel(name, fontsize=5.5)
    for axis, name in zip(axes[0], columns, strict=True):
        axis.set_title(name, fontsize=6)
    return figure
