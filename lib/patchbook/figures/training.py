"""Figures of training (§3.1)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from patchbook.figures.parts import figure_of


@figure_of()
def training_curves(runs: Mapping[str, Sequence[Mapping[str, float]]], title: str = "") -> Figure:
    """Show reconstruction, sparsity and dead latents of several runs over the tokens seen (§3.1)."""
    panels = (
        ("mse", "MSE / ‖x‖ (unit of Table 2)", "log"),
        ("fvu", "unexplained variance (FVU)", "log"),
        ("l0", "active latents per token (L0)", "log"),
        ("dead_share", "share of dead latents", "linear"),
    )
    figure, axes = plt.subplots(1, 4, figsize=(14, 3.2), layout="constrained")
    for axis, (key, label, scale) in zip(axes, panels, strict=True):
        for name, metrics in runs.items():
            tokens = np.array([row["tokens"] for row in metrics]) / 1e6
            axis.plot(tokens, [row[key] for row in metrics], lw=1.2, label=name)
        # runs differ in length by far: on a straight axis the short one would be a dash
        axis.set(xlabel="tokens seen (million)", ylabel=label, xscale="log", yscale=scale)
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.suptitle(title)
    return figure


@figure_of()
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


@figure_of()
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


@figure_of()
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
