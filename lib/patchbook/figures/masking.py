"""Figures of top-k latent masking (Fig. 5, 15, 16)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from patchbook.figures.parts import BLUE, PURPLE, SMALL, VERMILION, WIDTH, folded, grid_of
from patchbook.figures.showing import figure_of

COLOURS = {"class (oracle)": VERMILION, "class (predicted)": BLUE, "dataset": PURPLE, "random": "0.45"}
MARKS = {"class (oracle)": "o", "class (predicted)": "s", "dataset": "^", "random": "x"}
WIDTHS = {"class (predicted)": 2.6}
"""Points of a line that another may lie on: it is seen on both sides of it."""
STYLES = {"on": "-", "off": "--"}
MOST = 6
"""Numbers of latents that a table of answers has room for."""
ANSWERS = ListedColormap(["#F6D6C2", "#CFE3F1"])
"""Light vermilion and light blue, below ✗ and ✓."""


@figure_of(
    "Fig. 5",
    caption="Accuracy when only the k strongest latents are on (solid) or when they are off "
    "(dashed). Colour and mark say how latents were ranked; bands are 95 % intervals.",
)
def masking_curves(tables: Mapping[str, xr.Dataset], columns: int = 3, width: float = 3.5) -> Figure:
    """Fig. 5(b, c), 15, 16: accuracy over the number of latents switched on or off, a panel per table.

    Tables are those of `masking.curves`. Bands are their intervals, horizontal lines the unmasked model,
    every latent on (identity) and chance.
    """
    single = len(tables) == 1
    figure, axes = grid_of(len(tables), columns, width, 0.5 if single else 1.05, 1.2)
    for axis, (title, table) in zip(axes, tables.items(), strict=True):
        _panel(axis, table)
        axis.set_title(folded(title, 90 if single else 30), fontsize=9)
    figure.supylabel("top-1 accuracy (%)", fontsize=9)
    shown = [str(name) for name in next(iter(tables.values())).ranking.values]
    keys = [
        Line2D(
            [], [], color=COLOURS[name], ls=style, marker=MARKS[name], ms=4, lw=WIDTHS.get(name, 1.2),
            label=f"{switch} top-k, {name}",
        )
        for name in shown
        for switch, style in STYLES.items()
    ]  # fmt: skip
    keys += [Line2D([], [], color="k", ls=style, lw=0.9, label=name) for name, style in _LEVELS.items()]
    figure.legend(handles=keys, loc="outside lower center", ncols=3, handlelength=3)
    return figure


_LEVELS = {"original": (0, (6, 2)), "identity (all on)": "-.", "chance": ":"}


def _panel(axis: Axes, table: xr.Dataset) -> None:
    k = table.k.values
    place = np.arange(len(k))  # evenly: the last sizes of a small SAE would lie on one another
    # the oracle comes last: where the model is right the predicted class is the same, and lies below it
    for name in reversed([str(name) for name in table.ranking.values]):
        for switch, style in STYLES.items():
            row = table.sel(ranking=name, switch=switch)
            axis.plot(
                place, 100 * row.accuracy, ls=style, marker=MARKS[name], ms=3.5, lw=WIDTHS.get(name, 1.1),
                color=COLOURS[name], label=f"{switch} top-k, {name}", alpha=0.55 if name in WIDTHS else 1,
            )  # fmt: skip
            axis.fill_between(place, 100 * row.low, 100 * row.high, color=COLOURS[name], alpha=0.13, lw=0)
    whole = float(table.accuracy.sel(switch="on").isel(k=-1, ranking=0))
    levels = table.attrs["original"][0], whole, 1 / table.attrs["classes"]
    for level, (name, style) in zip(levels, _LEVELS.items(), strict=True):
        axis.axhline(100 * level, color="k", ls=style, lw=0.9, marker="", label=name)
    axis.set(ylim=(0, 102))
    axis.set_xticks(place, [f"{n:,}" for n in k], rotation=90)
    axis.set_xlabel("k latents", labelpad=1)
    axis.grid(alpha=0.25)


@figure_of(
    "Fig. 5", "Fig. 6", "Fig. 22",
    caption="What the model answers to each image when only some latents are on or off: ✓ where it "
    "is right, else the class it names.",
)  # fmt: skip
def masked_predictions(
    images: Sequence[np.ndarray],
    titles: Sequence[str],
    names: np.ndarray,
    right: np.ndarray,
    rows: Sequence[str],
    columns: Sequence[str],
) -> Figure:
    """Fig. 5(c), examples: what the model says to an image under each mask, right answers ticked.

    Of more than six columns six are shown, the first and the last among them.

    Parameters
    ----------
    names, right : [images, rows, columns], predicted class and whether it is the true one
    rows, columns : names of the masks
    """
    kept = np.unique(np.linspace(0, len(columns) - 1, min(MOST, len(columns))).round().astype(int))
    height = 0.34 * len(rows) + 0.5
    figure, axes = plt.subplots(
        len(images), 2, figsize=(WIDTH, max(height, 1.35) * len(images)), layout="constrained",
        squeeze=False, width_ratios=(1.1, 5.9),
    )  # fmt: skip
    for number, (left, axis) in enumerate(axes):
        left.imshow(images[number])
        left.axis("off")
        left.set_title(folded(titles[number], 16), fontsize=9)
        axis.imshow(right[number][:, kept].astype(float), cmap=ANSWERS, vmin=0, vmax=1, aspect="auto")
        axis.set_xticks(range(len(kept)), [columns[at] for at in kept])
        axis.set_yticks(range(len(rows)), rows)
        axis.tick_params(length=0)
        axis.tick_params(axis="x", bottom=False, labelbottom=False, labeltop=True)
        axis.spines[:].set_visible(False)
        axis.set_xticks(np.arange(len(kept) - 1) + 0.5, minor=True)
        axis.set_yticks(np.arange(len(rows) - 1) + 0.5, minor=True)
        axis.grid(which="minor", color="w", lw=1.5)
        axis.tick_params(which="minor", length=0)
        for (i, j), name in np.ndenumerate(names[number][:, kept]):
            said = "✓" if right[number][i, kept[j]] else folded(f"✗ {name}", 11)
            axis.text(j, i, said, ha="center", va="center", fontsize=SMALL)
    return figure


@figure_of(
    caption="How much accuracy each class loses when the latents that rank highest for it are "
    "switched off; grey dots are its accuracy with all latents on."
)
def class_changes(change: np.ndarray, size: int, baseline: np.ndarray) -> Figure:
    """Show how each class's accuracy changes when its top latents (oracle ranking) are switched off.

    Parameters
    ----------
    change, baseline : [C], accuracy with `size` latents off minus that with all on; the latter
    """
    order = np.argsort(change, kind="stable")
    figure, axis = plt.subplots(figsize=(WIDTH, 3), layout="constrained")
    places = range(len(order))
    axis.fill_between(
        places, 0, 100 * change[order], step="mid", color=BLUE, alpha=0.7, label="change (points)"
    )
    axis.plot(places, 100 * baseline[order], ".", ms=3, color="0.4", label="accuracy, all latents on (%)")
    axis.axhline(0, color="k", lw=0.8, marker="")
    axis.set(xlabel="classes, by change", ylabel=f"top {size} off, class (oracle)")
    axis.legend()
    axis.grid(alpha=0.25)
    return figure
