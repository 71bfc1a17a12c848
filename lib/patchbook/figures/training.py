"""Figures of training (§3.1)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from patchbook.figures.parts import draw_pictures, grid_of
from patchbook.figures.showing import figure_of


@figure_of(
    caption="How reconstruction error, sparsity and dead latents change as more tokens are seen; "
    "both axes are logarithmic but for the dead share."
)
def training_curves(runs: Mapping[str, Sequence[Mapping[str, float]]], title: str = "") -> Figure:
    """Show reconstruction, sparsity and dead latents of several runs over the tokens seen (§3.1)."""
    panels = (
        ("mse", "MSE / ‖x‖ (unit of Table 2)", "log"),
        ("fvu", "unexplained variance (FVU)", "log"),
        ("l0", "active latents per token (L0)", "log"),
        ("dead_share", "share of dead latents", "linear"),
    )
    figure, axes = grid_of(len(panels), 2, 3.5, 0.66)
    for axis, (key, label, scale) in zip(axes, panels, strict=True):
        for name, metrics in runs.items():
            tokens = np.array([row["tokens"] for row in metrics]) / 1e6
            axis.plot(tokens, [row[key] for row in metrics], lw=1.2, ms=3, markevery=0.12, label=name)
        # runs differ in length by far: on a straight axis the short one would be a dash
        axis.set(xlabel="tokens seen (million)", ylabel=label, xscale="log", yscale=scale)
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.suptitle(title)
    return figure


@figure_of(
    caption="Accuracy of the small CLIP on scenes it was not trained on, by style, as it sees more images."
)
def learning_curve(rows: Sequence[Mapping[str, float]], domains: Sequence[str], chance: float) -> Figure:
    """Show the small CLIP's zero-shot accuracy on held-out scenes against the images it has seen."""
    figure, axis = plt.subplots(figsize=(6, 3.4), layout="constrained")
    images = np.array([row["images"] for row in rows]) / 1e3
    for domain in domains:
        axis.plot(images, [100 * row[f"{domain}_concept"] for row in rows], ms=3.5, label=domain)
    axis.axhline(100 * chance, color="0.5", ls=":", marker="", label="chance")
    axis.set(xlabel="images seen (thousand)", ylabel="zero-shot top-1 (%)", ylim=(0, 100))
    axis.grid(alpha=0.3)
    axis.legend()
    return figure


@figure_of(caption="Latents that have not fired for a while, with ghost gradients and without.")
def dead_latents(runs: Mapping[str, Sequence[Mapping[str, float]]]) -> Figure:
    """Show the share of dead latents over the steps of several runs (footnote 5)."""
    figure, axis = plt.subplots(figsize=(6, 3.2), layout="constrained")
    for name, metrics in runs.items():
        steps = [row["step"] for row in metrics]
        axis.plot(steps, [100 * row["dead_share"] for row in metrics], lw=1.2, markevery=0.1, label=name)
    axis.set(xlabel="step", ylabel="dead latents (%)", ylim=(0, None))
    axis.grid(alpha=0.3)
    axis.legend()
    return figure


@figure_of(caption="Images as the model sees them, with their labels.")
def image_row(images: Sequence[np.ndarray], titles: Sequence[str], columns: int = 8) -> Figure:
    """Show images [H, W, 3] in a grid with a title below each."""
    columns = min(columns, 8)
    figure, axes = grid_of(len(images), columns, 1.2, 1.36)
    draw_pictures(axes, images, titles, wide=12 if columns > 6 else 18)
    return figure
