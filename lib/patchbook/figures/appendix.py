"""Figures of the appendix: what the training choices change (Table 2, Fig. 8), and stability over seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import xarray as xr
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from patchbook.figures.parts import PALETTE, WIDTH, draw_intervals, folded
from patchbook.figures.showing import figure_of
from patchsae.runs.intervals import Interval


class Traded(NamedTuple):
    """One autoencoder of an ablation."""

    name: str
    l0: float
    """Active latents per token."""
    fvu: float
    """Unexplained variance."""


@figure_of(
    "Fig. 8",
    caption="Each point is a latent: how often it fires against how strongly, coloured by how spread "
    "its labels are. Panels share their axes.",
)
def token_scatters(atlases: Mapping[str, xr.Dataset]) -> Figure:
    """Fig. 8: statistics of several autoencoders side by side, axes and colours shared."""
    figure, axes = plt.subplots(
        1, len(atlases), figsize=(WIDTH, 3.6), layout="constrained", sharex=True, sharey=True, squeeze=False
    )
    highest = max(float(atlas.entropy.max()) for atlas in atlases.values())
    for axis, (name, atlas) in zip(axes[0], atlases.items(), strict=True):
        alive = (atlas.image_frequency > 0).values
        points = axis.scatter(
            np.log10(atlas.image_frequency.values[alive]), np.log10(atlas.mean_activation.values[alive]),
            c=atlas.entropy.values[alive], s=6, vmin=0, vmax=highest, linewidths=0, rasterized=True,
        )  # fmt: skip
        axis.set_title(f"{name}\n{alive.sum():,} of {alive.size:,} latents fire")
        axis.set_xlabel("log10 activated frequency\n(share of images)")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("log10 mean activation\n(image mean over active images)")
    figure.colorbar(points, ax=axes[0], label="label entropy (nat)", fraction=0.04)
    return figure


@figure_of(
    caption="Each row of Table 2 as a point: fewer active latents to the left, less error below. "
    "Both axes are logarithmic."
)
def sparsity_and_error(groups: Mapping[str, Sequence[Traded]]) -> Figure:
    """Show unexplained variance against active latents, one panel per group of rows of Table 2."""
    most = max(map(len, groups.values()))
    figure, axes = plt.subplots(
        1, len(groups), figsize=(WIDTH, 3.7 + 0.19 * most), layout="constrained", squeeze=False
    )
    for axis, (title, rows) in zip(axes[0], groups.items(), strict=True):
        # eleven marks and eight colours: together they come back after 88 rows
        for row, marker, colour in zip(rows, cycle("osD^vP*X<>p"), cycle(PALETTE)):
            axis.plot(
                max(row.l0, 1e-2), max(row.fvu, 1e-4), marker, ms=7, color=colour, mec="0.3", mew=0.5,
                label=row.name,
            )  # fmt: skip
        axis.set(
            xlabel="active latents per token (L0)", ylabel="unexplained variance (FVU)", title=title,
            xscale="log", yscale="log",
        )  # fmt: skip
        for side in (axis.xaxis, axis.yaxis):
            # plain numbers inside a power of ten too: rows may all lie within one
            side.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7)))
            side.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            side.set_minor_locator(NullLocator())
        axis.tick_params(axis="x", rotation=90)
        axis.margins(0.1)
        axis.grid(alpha=0.3)
        # under the axes: rows that a choice hardly changes lie on one another
        axis.legend(ncols=1, loc="upper center", bbox_to_anchor=(0.5, -0.25))
    return figure


@figure_of(
    caption="How alike latents of two autoencoders are when each is matched with one of the other: 1 "
    "is the same direction."
)
def matched_histograms(found: Mapping[str, Mapping[str, np.ndarray]]) -> Figure:
    """Show how cosines of matched latents are distributed: a panel per autoencoder, a curve per control."""
    figure, axes = plt.subplots(
        1, len(found), figsize=(WIDTH, 3.6), layout="constrained", sharex=True, squeeze=False
    )
    lowest = min(float(values.min()) for curves in found.values() for values in curves.values())
    edges = np.linspace(min(lowest, 0), 1, 61)
    for axis, (title, curves) in zip(axes[0], found.items(), strict=True):
        lines = cycle(("-", "--", ":", "-."))
        for number, ((name, values), colour) in enumerate(zip(curves.items(), cycle(PALETTE))):
            share, first = np.histogram(values, edges)[0] / len(values), number == 0
            axis.stairs(
                share, edges, label=name, fill=first, alpha=0.5 if first else 1, lw=1.4, color=colour,
                ls=next(lines),
            )  # fmt: skip
        axis.set(title=folded(title, 34), xlabel="cosine of matched latents", ylabel="share of latents")
        axis.grid(alpha=0.3)
    # below: some curve is high wherever a legend would lie in the axes
    handles = axes[0][0].get_legend_handles_labels()
    figure.legend(*handles, ncols=2, loc="outside lower center")
    return figure


@figure_of(
    caption="How far each autoencoder is ahead of an untrained one that is as sparse: right of the "
    "line the trained one is better. Bars are 95 % intervals."
)
def ahead_of_untrained(found: Mapping[str, Mapping[str, Interval]]) -> Figure:
    """Show how far autoencoders are ahead of untrained ones: a line per measure, a colour for each."""
    names = list(next(iter(found.values())))
    figure, axis = plt.subplots(figsize=(WIDTH, 1.2 + 0.55 * len(found)), layout="constrained")
    draw_intervals(axis, found, folds=40)
    axis.axvline(0, color="0.4", lw=1, marker="")
    axis.set_xlabel("trained − untrained of the same L0 (share, 0 … 1)")
    axis.legend(ncols=min(len(names), 3), loc="lower center", bbox_to_anchor=(0.5, 1))
    return figure
