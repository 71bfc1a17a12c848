"""Figures of CLIP against an adapted model (Fig. 5(c), 6, 7, 11, 15-21)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from patchbook.figures.parts import figure_of
from patchsae.adaptation.remapping import Groups
from patchsae.runs.intervals import Interval

GROUP_COLOURS = {"high": "tab:green", "high_to_low": "tab:blue", "low_to_high": "tab:red"}
MODEL_COLOURS = {"CLIP": "tab:blue", "MaPLe": "tab:orange"}
UNMASKED = (0, (6, 2))


class Counts(NamedTuple):
    """Counts of latents [S] under two models, and what is marked."""

    before: np.ndarray
    after: np.ndarray
    groups: Groups | None = None
    bounds: tuple[float, float] | None = None
    """Upper and lower, drawn as lines."""
    note: str = ""
    marked: Mapping[int, str] = {}
    """Latents that are named, and how."""


@figure_of("Fig. 6", "Fig. 7", "Fig. 17", "Fig. 20")
def count_scatters(panels: Mapping[str, Counts], columns: int = 4, width: float = 2.9) -> Figure:
    """Fig. 6, 7, 17, 20: counts under CLIP against counts under the adapted model, a point per latent.

    Axes are logarithmic; a correlation in a panel's note is to say that it is of the counts themselves.
    """
    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    size = (width * columns, width * rows + 0.4)
    figure, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    for axis, (title, panel) in zip(axes.flat[: len(panels)], panels.items(), strict=True):
        _scatter(axis, panel)
        axis.set_title(f"{title}\n{panel.note}" if panel.note else title, fontsize=7.5)
    if any(panel.groups for panel in panels.values()):
        keys = [
            Line2D([], [], ls="", marker="o", ms=4, color=colour, label=name.replace("_", "-"))
            for name, colour in GROUP_COLOURS.items()
        ]
        figure.legend(handles=keys, loc="outside lower center", ncols=3, fontsize=7)
    return figure


def _scatter(axis: Axes, panel: Counts) -> None:
    x, y = np.log10(1 + panel.before), np.log10(1 + panel.after)
    top = max(x.max(), y.max(), 1) * 1.05
    axis.plot([0, top], [0, top], color="0.6", lw=0.8, ls=":")
    axis.scatter(x, y, s=4, color="0.75", linewidths=0)
    for name, members in panel.groups._asdict().items() if panel.groups else ():
        axis.scatter(x[members], y[members], s=9, color=GROUP_COLOURS[name], linewidths=0)
    for bound in panel.bounds or ():
        for line in (axis.axhline, axis.axvline):
            line(np.log10(1 + bound), color="0.4", lw=0.6, ls="--")
    for latent, name in panel.marked.items():
        axis.annotate(name, (x[latent], y[latent]), fontsize=6, xytext=(3, 3), textcoords="offset points")
    axis.set(xlim=(0, top), ylim=(0, top))
    axis.set_xlabel("CLIP: log10(1 + tokens above τ)", fontsize=6.5)
    axis.set_ylabel("adapted: log10(1 + tokens above τ)", fontsize=6.5)
    axis.tick_params(labelsize=6)


@figure_of("Fig. 11", "Fig. 15", "Fig. 16")
def setting_curves(
    panels: Mapping[str, Mapping[tuple[str, str], xr.Dataset]], ranking: str, columns: int = 4,
    width: float = 3.1,
) -> Figure:  # fmt: skip
    """Fig. 5(c), 11, 15, 16: masking curves of (ranked by, classified by) pairs of models, a panel per set.

    Colours are the classifying model, filled marks latents ranked by CLIP; levels are the unmasked models
    and chance.
    """
    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    size = (width * columns, 0.8 * width * rows + 0.6)
    figure, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    for axis, (title, settings) in zip(axes.flat[: len(panels)], panels.items(), strict=True):
        for (ranked, classified), table in settings.items():
            colour, place = MODEL_COLOURS[classified], np.arange(table.sizes["k"])
            fill = colour if ranked == "CLIP" else "white"
            for switch, style in (("on", "-"), ("off", "--")):
                row = table.sel(ranking=ranking, switch=switch)
                axis.plot(place, 100 * row.accuracy, style, marker="o", ms=3, lw=1, color=colour, mfc=fill)
                axis.fill_between(place, 100 * row.low, 100 * row.high, color=colour, alpha=0.08, lw=0)
            axis.axhline(100 * table.attrs["original"][0], color=colour, ls=UNMASKED, lw=0.8)
            axis.set_xticks(place, [f"{n:,}" for n in table.k.values], rotation=90)
        axis.axhline(100 / table.attrs["classes"], color="k", ls=":", lw=0.9)
        axis.set(ylim=(0, 102))
        axis.set_title(title, fontsize=8)
        axis.set_xlabel("k latents", fontsize=7)
        axis.tick_params(labelsize=6)
        axis.grid(alpha=0.25)
    for row_of_panels in axes:
        row_of_panels[0].set_ylabel("top-1 accuracy (%)", fontsize=7)
    keys = [
        Line2D(
            [], [], color=MODEL_COLOURS[classified], marker="o", ms=4,
            mfc=MODEL_COLOURS[classified] if ranked == "CLIP" else "white",
            label=f"ranked by {ranked}, classified by {classified}",
        )
        for ranked, classified in next(iter(panels.values()))
    ]  # fmt: skip
    lines = {"on top-k": "-", "off top-k": "--", "unmasked": UNMASKED, "chance": ":"}
    keys += [Line2D([], [], color="0.3", ls=style, label=name) for name, style in lines.items()]
    keys.append(Patch(color="0.3", alpha=0.15, lw=0, label="95 % interval"))
    figure.legend(handles=keys, loc="outside lower center", ncols=3, fontsize=7, handlelength=3)
    return figure


@figure_of("Fig. 21")
def confusion_pair(before: np.ndarray, after: np.ndarray, names: Sequence[str]) -> Figure:
    """Fig. 18, 21: confusion matrices [C, C] of both models in shares, rows the true class."""
    size = min(1.6 + 0.22 * len(names), 8)
    figure, axes = plt.subplots(1, 2, figsize=(2 * size + 0.6, size), layout="constrained")
    for axis, table, title in zip(axes, (before, after), ("CLIP", "adapted"), strict=True):
        picture = axis.imshow(table, vmin=0, vmax=1, cmap="Blues")
        axis.set_title(title, fontsize=8)
        axis.set_xticks(range(len(names)), names, rotation=90, fontsize=5)
        axis.set_yticks(range(len(names)), names if axis is axes[0] else [], fontsize=5)
        axis.set_xlabel("predicted class", fontsize=7)
    axes[0].set_ylabel("true class", fontsize=7)
    figure.colorbar(picture, ax=axes, label="share of the true class's images", fraction=0.03)
    return figure


@figure_of()
def gain_shares(rows: Mapping[str, Mapping[str, Interval]]) -> Figure:
    """Show which share of the adapted gain each mixture of parts has: groups along the axis."""
    figure, axis = plt.subplots(figsize=(1.5 * len(rows) + 4.5, 3.6), layout="constrained")
    names = list(next(iter(rows.values())))
    for number, name in enumerate(names):
        place = np.arange(len(rows)) + (number - (len(names) - 1) / 2) * 0.11
        value, low, high = np.array([group[name] for group in rows.values()]).T
        error = np.maximum(np.stack([value - low, high - value]), 0)
        axis.errorbar(place, value, error, fmt="o", ms=4, capsize=2, label=name)
    axis.axhline(0, color="k", lw=0.8)
    axis.axhline(1, color="k", lw=0.8, ls="--")
    axis.set_xticks(np.arange(len(rows)), list(rows))
    axis.set(ylabel="share of the adapted gain")
    axis.grid(alpha=0.3, axis="y")
    axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure
