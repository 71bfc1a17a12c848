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

from patchbook.figures.parts import figure_of
from patchsae.runs.intervals import Interval


class Traded(NamedTuple):
    """One autoencoder of an ablation."""

    name: str
    l0: float
    """Active latents per token."""
    fvu: float
    """Unexplained variance."""


@figure_of("Fig. 8")
def token_scatters(atlases: Mapping[str, xr.Dataset]) -> Figure:
    """Fig. 8: statistics of several autoencoders side by side, axes and colours shared."""
    figure, axes = plt.subplots(
        1, len(atlases), figsize=(4.4 * len(atlases) + 0.8, 4.2), layout="constrained",
        sharex=True, sharey=True, squeeze=False,
    )  # fmt: skip
    highest = max(float(atlas.entropy.max()) for atlas in atlases.values())
    for axis, (name, atlas) in zip(axes[0], atlases.items(), strict=True):
        alive = (atlas.frequency > 0).values
        points = axis.scatter(
            np.log10(atlas.frequency.values[alive]), np.log10(atlas.mean_activation.values[alive]),
            c=atlas.entropy.values[alive], s=5, vmin=0, vmax=highest, cmap="viridis", linewidths=0,
        )  # fmt: skip
        axis.set_title(f"{name}\n{alive.sum():,} of {alive.size:,} latents fire", fontsize=10)
        axis.set_xlabel("log10 activated frequency (share of images)")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("log10 mean activation (image mean over active images)")
    figure.colorbar(points, ax=axes[0], label="label entropy (nat)", fraction=0.04)
    return figure


@figure_of()
def sparsity_and_error(groups: Mapping[str, Sequence[Traded]]) -> Figure:
    """Show unexplained variance against active latents, one panel per group of rows of Table 2."""
    figure, axes = plt.subplots(
        1, len(groups), figsize=(4.8 * len(groups), 4.6), layout="constrained", squeeze=False
    )
    for axis, (title, rows) in zip(axes[0], groups.items(), strict=True):
        for row, marker in zip(rows, cycle("osD^vP*X<>")):
            axis.plot(max(row.l0, 1e-2), max(row.fvu, 1e-4), marker, ms=7, alpha=0.8, label=row.name)
        axis.set(
            xlabel="active latents per token (L0)", ylabel="unexplained variance (FVU)", title=title,
            xscale="log", yscale="log",
        )  # fmt: skip
        for side in (axis.xaxis, axis.yaxis):
            # plain numbers inside a power of ten too: rows may all lie within one
            side.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7)))
            side.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            side.set_minor_locator(NullLocator())
        axis.margins(0.1)
        axis.grid(alpha=0.3)
        # under the axes: rows that a choice hardly changes lie on one another
        axis.legend(fontsize=9, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.16))
    return figure


@figure_of()
def matched_histograms(found: Mapping[str, Mapping[str, np.ndarray]]) -> Figure:
    """Show how cosines of matched latents are distributed: a panel per autoencoder, a curve per control."""
    figure, axes = plt.subplots(
        1, len(found), figsize=(4.8 * len(found), 4.0), layout="constrained", sharex=True, squeeze=False
    )
    lowest = min(float(values.min()) for curves in found.values() for values in curves.values())
    edges = np.linspace(min(lowest, 0), 1, 61)
    for axis, (title, curves) in zip(axes[0], found.items(), strict=True):
        for number, (name, values) in enumerate(curves.items()):
            share = np.histogram(values, edges)[0] / len(values)
            axis.stairs(share, edges, label=name, fill=number == 0, alpha=0.5 if number == 0 else 1, lw=1.3)
        axis.set(title=title, xlabel="cosine of matched latents", ylabel="share of latents")
        axis.grid(alpha=0.3)
    # below: some curve is high wherever a legend would lie in the axes
    handles = axes[0][0].get_legend_handles_labels()
    figure.legend(*handles, fontsize=9, ncols=2, loc="outside lower center")
    return figure


@figure_of()
def ahead_of_untrained(found: Mapping[str, Mapping[str, Interval]]) -> Figure:
    """Show how far autoencoders are ahead of untrained ones: a line per measure, a colour for each."""
    names = list(next(iter(found.values())))
    figure, axis = plt.subplots(figsize=(7.2, 0.9 + 0.55 * len(found)), layout="constrained")
    places = np.arange(len(found))[::-1]
    for number, name in enumerate(names):
        value, low, high = np.array([tuple(row[name]) for row in found.values()]).T
        shift = 0.12 * (len(names) - 1 - 2 * number)
        axis.errorbar(
            value, places + shift, xerr=np.stack([value - low, high - value]), fmt="o", ms=5, capsize=3,
            label=name,
        )  # fmt: skip
    axis.axvline(0, color="0.4", lw=1)
    axis.set_yticks(places, list(found), fontsize=9)
    axis.set_ylim(-0.6, len(found) - 0.4)
    axis.set_xlabel("trained − untrained of the same L0 (share, 0 … 1), 95 % interval")
    axis.grid(alpha=0.3, axis="x")
    axis.legend(fontsize=9, ncols=len(names), loc="lower center", bbox_to_anchor=(0.5, 1))
    return figure
