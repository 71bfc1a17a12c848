"""Figures of top-k latent masking (Fig. 5, 15, 16)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from patchbook.figures.parts import figure_of

COLOURS = {
    "class (oracle)": "tab:red",
    "class (predicted)": "tab:orange",
    "dataset": "tab:blue",
    "random": "0.45",
}
STYLES = {"on": ("-", "o"), "off": ("--", "s")}


@figure_of("Fig. 5")
def masking_curves(tables: Mapping[str, xr.Dataset], columns: int = 4, width: float = 3.6) -> Figure:
    """Fig. 5(b, c), 15, 16: accuracy over the number of latents switched on or off, a panel per table.

    Tables are those of `masking.curves`. Bands are their intervals, horizontal lines the unmasked model,
    every latent on (identity) and chance.
    """
    columns = min(columns, len(tables))
    rows = -(-len(tables) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(width * columns, 0.8 * width * rows + 0.6), layout="constrained",
        squeeze=False,
    )  # fmt: skip
    for axis in axes.flat[len(tables) :]:
        axis.axis("off")
    for axis, (title, table) in zip(axes.flat[: len(tables)], tables.items(), strict=True):
        _panel(axis, table)
        axis.set_title(title, fontsize=8)
    for line in axes:
        line[0].set_ylabel("top-1 accuracy (%)", fontsize=7)
    shown = [str(name) for name in next(iter(tables.values())).ranking.values]
    keys = [
        Line2D([], [], color=COLOURS[name], ls=style, marker=mark, ms=3, label=f"{switch} top-k, {name}")
        for name in shown
        for switch, (style, mark) in STYLES.items()
    ]
    keys += [Line2D([], [], color="k", ls=style, lw=0.9, label=name) for name, style in _LEVELS.items()]
    figure.legend(handles=keys, loc="outside lower center", ncols=4, fontsize=7)
    return figure


_LEVELS = {"original": (0, (6, 2)), "identity (all on)": "-.", "chance": ":"}


def _panel(axis: Axes, table: xr.Dataset) -> None:
    k = table.k.values
    place = np.arange(len(k))  # evenly: the last sizes of a small SAE would lie on one another
    for name in table.ranking.values:
        for switch, (style, mark) in STYLES.items():
            row = table.sel(ranking=name, switch=switch)
            colour = COLOURS[str(name)]
            axis.plot(place, 100 * row.accuracy, style, marker=mark, ms=2.5, lw=1.1, color=colour)
            axis.fill_between(place, 100 * row.low, 100 * row.high, color=colour, alpha=0.13, lw=0)
    whole = float(table.accuracy.sel(switch="on").isel(k=-1, ranking=0))
    levels = table.attrs["original"][0], whole, 1 / table.attrs["classes"]
    for level, style in zip(levels, _LEVELS.values(), strict=True):
        axis.axhline(100 * level, color="k", ls=style, lw=0.9)
    axis.set(ylim=(0, 102))
    axis.set_xticks(place, [f"{n:,}" for n in k], rotation=90)
    axis.set_xlabel("k latents", fontsize=7)
    axis.tick_params(labelsize=6)
    axis.grid(alpha=0.25)


@figure_of("Fig. 5", "Fig. 6", "Fig. 22")
def masked_predictions(
    images: Sequence[np.ndarray],
    titles: Sequence[str],
    names: np.ndarray,
    right: np.ndarray,
    rows: Sequence[str],
    columns: Sequence[str],
) -> Figure:
    """Fig. 5(c), examples: what the model says to an image under each mask, right answers green.

    Parameters
    ----------
    names, right : [images, rows, columns], predicted class and whether it is the true one
    rows, columns : names of the masks
    """
    figure, axes = plt.subplots(
        len(images), 2, figsize=(1.0 * len(columns) + 2.4, (0.27 * len(rows) + 0.75) * len(images)),
        layout="constrained", squeeze=False, width_ratios=(1.3, len(columns)),
    )  # fmt: skip
    for number, (left, axis) in enumerate(axes):
        left.imshow(images[number])
        left.axis("off")
        left.set_title(titles[number], fontsize=7)
        axis.imshow(right[number], cmap="RdYlGn", vmin=-0.6, vmax=1.6, aspect="auto")
        axis.set_xticks(range(len(columns)), columns, fontsize=6)
        axis.set_yticks(range(len(rows)), rows, fontsize=6)
        axis.tick_params(length=0)
        for (i, j), name in np.ndenumerate(names[number]):
            axis.text(
                j, i, name if len(name) < 17 else name[:15] + "…", ha="center", va="center", fontsize=5
            )
    return figure


@figure_of()
def class_changes(change: np.ndarray, size: int, baseline: np.ndarray) -> Figure:
    """Show how each class's accuracy changes when its top latents (oracle ranking) are switched off.

    Parameters
    ----------
    change, baseline : [C], accuracy with `size` latents off minus that with all on; the latter
    """
    order = np.argsort(change, kind="stable")
    figure, axis = plt.subplots(figsize=(7, 3), layout="constrained")
    places = range(len(order))
    axis.fill_between(places, 0, 100 * change[order], step="mid", alpha=0.7, label="change (points)")
    axis.plot(places, 100 * baseline[order], ".", ms=2.5, color="0.4", label="accuracy, all latents on (%)")
    axis.axhline(0, color="k", lw=0.8)
    axis.set(xlabel="classes, by change", ylabel=f"top {size} off, class (oracle)")
    axis.legend(fontsize=7)
    axis.grid(alpha=0.25)
    return figure
