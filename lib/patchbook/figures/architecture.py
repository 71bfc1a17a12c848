"""The rooms of the library and what flows between them."""

from __future__ import annotations

from typing import NamedTuple

from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch


class Box(NamedTuple):
    """A room on the picture: where its middle is, and what it does."""

    x: float
    y: float
    does: str


WIDE, HIGH = 2.0, 1.05
INK, BLACK = "#48566b", "#1a1f2b"
ROOMS = {
    "images": Box(1.2, 5.0, "sets, reading,\nfew-shot draws"),
    "clip": Box(4.3, 5.0, "cut in two\nafter a block"),
    "sae": Box(7.4, 5.0, "tokens as a few\nlatents, and back"),
    "latents": Box(10.5, 5.0, "statistics, references,\nmaps, scores"),
    "training": Box(5.85, 3.2, "tokens mixed,\nweights learned"),
    "masking": Box(8.95, 3.2, "some latents only:\nwhat is answered?"),
    "adaptation": Box(2.75, 3.2, "prompts: the same\nCLIP, adapted"),
    "explorer": Box(12.05, 3.2, "a page\nto click in"),
}
COLOURS = {"images": "#e8f0fb", "clip": "#fdf0dc", "sae": "#e9f6ea", "latents": "#f6e9f5"}
FLOWS = (  # from, to, what flows, bend
    ("images", "clip", "pixels", 0.0),
    ("clip", "sae", "tokens", 0.0),
    ("sae", "latents", "latents", 0.0),
    ("clip", "training", "tokens", 0.12),
    ("training", "sae", "weights", 0.12),
    ("sae", "masking", "latents", 0.12),
    ("latents", "masking", "rankings", -0.12),
    ("adaptation", "clip", "prompts", 0.12),
    ("latents", "explorer", "atlas", 0.12),
)


def rooms() -> Figure:
    """Draw the eight rooms that data passes, the flows between them, and `runs` under all of them."""
    figure = Figure(figsize=(11, 4.5))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, 13.25), ylim=(0.3, 5.75))
    axes.set_axis_off()
    for name, box in ROOMS.items():
        _box(axes, box.x, box.y, WIDE, HIGH, name, box.does, COLOURS.get(name, "#f2f3f5"))
    for source, target, what, bend in FLOWS:
        _arrow(axes, source, target, what, bend)
    # rebuilt tokens go back into the second half of the model
    under, middle = 1.85, ROOMS["clip"].x
    corners = [(ROOMS["masking"].x, 3.2 - HIGH / 2), (ROOMS["masking"].x, under), (middle, under)]
    axes.plot(*zip(*corners, strict=True), color=INK, lw=1.3, solid_joinstyle="round")
    _curve(axes, (middle, under), (middle, 5 - HIGH / 2), 0.0, "", None)
    _label(axes, (6.62, under), "rebuilt tokens, finished to answers")
    _box(
        axes,
        6.625,
        0.85,
        12.85,
        0.75,
        "runs",
        "result folders named by their inputs · processes · intervals · errors",
        "#ffffff",
        wide=True,
    )
    return figure


def _box(
    axes, x: float, y: float, w: float, h: float, name: str, does: str, colour: str, wide: bool = False
):
    corner = (x - w / 2, y - h / 2)
    shape = "round,pad=0,rounding_size=0.12"
    axes.add_patch(FancyBboxPatch(corner, w, h, boxstyle=shape, fc=colour, ec=INK, lw=1.2))
    if wide:
        axes.text(x, y, f"{name}:  {does}", ha="center", va="center", fontsize=10.5, color=BLACK)
        return
    axes.text(x, y + 0.27, name, ha="center", va="center", fontsize=12.5, weight="bold", color=BLACK)
    axes.text(x, y - 0.17, does, ha="center", va="center", fontsize=9.5, color=BLACK, linespacing=1.1)


def _arrow(axes, source: str, target: str, what: str, bend: float) -> None:
    a, b = ROOMS[source], ROOMS[target]
    if a.y == b.y:
        start, end, at = (a.x + WIDE / 2, a.y), (b.x - WIDE / 2, b.y), ((a.x + b.x) / 2, a.y + 0.2)
    else:
        down = a.y > b.y
        side = 0.45 if b.x > a.x else -0.45
        start = (a.x + side, a.y - HIGH / 2 if down else a.y + HIGH / 2)
        end = (b.x - side, b.y + HIGH / 2 if down else b.y - HIGH / 2)
        at = ((start[0] + end[0]) / 2, (start[1] + end[1]) / 2)
    _curve(axes, start, end, bend if a.y != b.y else 0.0, what, at)


def _curve(axes, start, end, bend: float, what: str, at) -> None:
    style = f"arc3,rad={bend}"
    axes.add_patch(
        FancyArrowPatch(
            start, end, connectionstyle=style, arrowstyle="-|>", mutation_scale=13, color=INK, lw=1.3
        )
    )
    if what:
        _label(axes, at, what)


def _label(axes, at: tuple[float, float], what: str) -> None:
    ground = {"boxstyle": "round,pad=0.12", "fc": "white", "ec": "none"}
    axes.text(*at, what, ha="center", va="center", fontsize=9, style="italic", color=INK, bbox=ground)
