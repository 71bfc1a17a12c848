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

from patchbook.figures.parts import (
    BLUE,
    GREEN,
    ORANGE,
    SMALL,
    VERMILION,
    WIDTH,
    draw_intervals,
    folded,
    grid_of,
)
from patchbook.figures.showing import figure_of
from patchsae.adaptation.remapping import Groups
from patchsae.runs.intervals import Interval

GROUPS = {"high": (GREEN, "o"), "high_to_low": (BLUE, "v"), "low_to_high": (VERMILION, "^")}
"""Colour and mark of each group."""
MODELS = {"CLIP": (BLUE, "o"), "MaPLe": (ORANGE, "s")}
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


@figure_of(
    "Fig. 6", "Fig. 7", "Fig. 17", "Fig. 20",
    caption="Each point is a latent: on how many tokens it is active in CLIP, against the adapted "
    "model. On the diagonal nothing changed.",
)  # fmt: skip
def count_scatters(panels: Mapping[str, Counts], columns: int = 3, width: float = 3.5) -> Figure:
    """Fig. 6, 7, 17, 20: counts under CLIP against counts under the adapted model, a point per latent.

    Axes are logarithmic; a correlation in a panel's note is to say that it is of the counts themselves.
    """
    figure, axes = grid_of(len(panels), min(columns, 3), width, 1.0, 0.75)
    wide = 30 if len(panels) > 2 else 44
    for axis, (title, panel) in zip(axes, panels.items(), strict=True):
        _scatter(axis, panel)
        note = f"\n{folded(panel.note, wide)}" if panel.note else ""
        axis.set_title(f"{folded(title, wide)}{note}", fontsize=8.5)
    figure.supxlabel("CLIP: log10(1 + tokens above τ)", fontsize=9)
    figure.supylabel("adapted: log10(1 + tokens above τ)", fontsize=9)
    if any(panel.groups for panel in panels.values()):
        keys = [
            Line2D([], [], ls="", marker=mark, ms=5, color=colour, label=name.replace("_", "-"))
            for name, (colour, mark) in GROUPS.items()
        ]
        figure.legend(handles=keys, loc="outside upper center", ncols=3)
    return figure


def _scatter(axis: Axes, panel: Counts) -> None:
    x, y = np.log10(1 + panel.before), np.log10(1 + panel.after)
    top = max(x.max(), y.max(), 1) * 1.05
    axis.plot([0, top], [0, top], color="0.6", lw=0.8, ls=":", marker="")
    axis.scatter(x, y, s=4, color="0.75", marker="o", linewidths=0, label="latents", rasterized=True)
    for name, members in panel.groups._asdict().items() if panel.groups else ():
        colour, mark = GROUPS[name]
        axis.scatter(
            x[members],
            y[members],
            s=16,
            color=colour,
            marker=mark,
            linewidths=0,
            label=name.replace("_", "-"),
        )
    for bound in panel.bounds or ():
        for line in (axis.axhline, axis.axvline):
            line(np.log10(1 + bound), color="0.4", lw=0.6, ls="--", marker="")
    for latent, name in panel.marked.items():
        axis.annotate(
            name, (x[latent], y[latent]), fontsize=SMALL, xytext=(3, 3), textcoords="offset points"
        )
    axis.set(xlim=(0, top), ylim=(0, top))
    axis.locator_params(nbins=5)


@figure_of(
    "Fig. 11", "Fig. 15", "Fig. 16",
    caption="Accuracy with only the k strongest latents on (solid) or off (dashed). Colour and shape "
    "say which model classifies; filled marks, that CLIP ranked the latents, open ones, that "
    "MaPLe did.",
)  # fmt: skip
def setting_curves(
    panels: Mapping[str, Mapping[tuple[str, str], xr.Dataset]], ranking: str, columns: int = 3,
    width: float = 3.5,
) -> Figure:  # fmt: skip
    """Fig. 5(c), 11, 15, 16: masking curves of (ranked by, classified by) pairs of models, a panel per set.

    Colours are the classifying model, filled marks latents ranked by CLIP; levels are the unmasked models
    and chance.
    """
    figure, axes = grid_of(len(panels), min(columns, 3), width, 1.0, 1.0)
    for axis, (title, settings) in zip(axes, panels.items(), strict=True):
        for (ranked, classified), table in settings.items():
            (colour, mark), place = MODELS[classified], np.arange(table.sizes["k"])
            fill = colour if ranked == "CLIP" else "white"
            for switch, style in (("on", "-"), ("off", "--")):
                row = table.sel(ranking=ranking, switch=switch)
                axis.plot(
                    place, 100 * row.accuracy, style, marker=mark, ms=3.5, lw=1, color=colour, mfc=fill,
                    label=f"{switch} top-k, ranked by {ranked}, classified by {classified}",
                )  # fmt: skip
                axis.fill_between(place, 100 * row.low, 100 * row.high, color=colour, alpha=0.1, lw=0)
            axis.axhline(100 * table.attrs["original"][0], color=colour, ls=UNMASKED, lw=0.9, marker="")
            axis.set_xticks(place, [f"{n:,}" for n in table.k.values], rotation=90)
        axis.axhline(100 / table.attrs["classes"], color="k", ls=":", lw=0.9, marker="")
        axis.set(ylim=(0, 102))
        axis.set_title(folded(title, 30 if len(panels) > 2 else 44))
        axis.grid(alpha=0.25)
    figure.supxlabel("k latents", fontsize=9)
    figure.supylabel("top-1 accuracy (%)", fontsize=9)
    keys = [
        Line2D(
            [], [], color=MODELS[classified][0], marker=MODELS[classified][1], ms=4.5,
            mfc=MODELS[classified][0] if ranked == "CLIP" else "white",
            label=f"ranked by {ranked}, classified by {classified}",
        )
        for ranked, classified in next(iter(panels.values()))
    ]  # fmt: skip
    lines = {"on top-k": "-", "off top-k": "--", "unmasked": UNMASKED, "chance": ":"}
    keys += [Line2D([], [], color="0.3", ls=style, label=name) for name, style in lines.items()]
    keys.append(Patch(color="0.3", alpha=0.15, lw=0, label="95 % interval"))
    figure.legend(handles=keys, loc="outside upper center", ncols=2, handlelength=3)
    return figure


@figure_of(
    "Fig. 21",
    caption="Which class is answered for each true class, before and after adaptation: right answers "
    "lie on the diagonal.",
)
def confusion_pair(before: np.ndarray, after: np.ndarray, names: Sequence[str]) -> Figure:
    """Fig. 18, 21: confusion matrices [C, C] of both models in shares, rows the true class."""
    height = min(2.7 + 0.14 * len(names), 8)
    figure, axes = plt.subplots(1, 2, figsize=(WIDTH, height), layout="constrained")
    short = [folded(name, 17, 1) for name in names]
    for axis, table, title in zip(axes, (before, after), ("CLIP", "adapted"), strict=True):
        picture = axis.imshow(table, vmin=0, vmax=1, cmap="Blues")
        axis.set_title(title)
        axis.set_xticks(range(len(names)), short, rotation=90)
        axis.set_yticks(range(len(names)), short if axis is axes[0] else [])
        axis.set_xlabel("predicted class")
    axes[0].set_ylabel("true class")
    figure.colorbar(
        picture, ax=axes, label="share of the true class's images", location="bottom", shrink=0.5, aspect=30
    )
    return figure


@figure_of(
    caption="Which share of the adapted model's gain remains when CLIP takes only some of its parts: "
    "1 is the whole gain. Bars are 95 % intervals."
)
def gain_shares(rows: Mapping[str, Mapping[str, Interval]]) -> Figure:
    """Show which share of the adapted gain each mixture of parts has: groups along the axis."""
    names = len(next(iter(rows.values())))
    size = (WIDTH, 1.1 + max(0.5, 0.17 * names) * len(rows) + 0.17 * names)
    figure, axis = plt.subplots(figsize=size, layout="constrained")
    draw_intervals(axis, rows)
    axis.axvline(0, color="k", lw=0.8, marker="")
    axis.axvline(1, color="k", lw=0.8, ls="--", marker="")
    axis.set(xlabel="share of the adapted gain")
    axis.legend(ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1))
    return figure
