"""A figure on its way to a reader: sharp pixels, a drawing to print, its numbers, and words for it.

In a kernel a figure of this package is displayed as one output with four forms: PNG at twice the pixels of
a screen, PDF, CSV and text. `patchbook.publishing` makes a page's figure of it.
"""

from __future__ import annotations

import base64
import csv
import io
import re
from collections.abc import Callable, Iterator
from functools import cache, wraps
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, PathCollection, PolyCollection
from matplotlib.container import BarContainer
from matplotlib.figure import Figure
from matplotlib.patches import StepPatch
from matplotlib.text import Text

from patchbook.collecting import FIGURE
from patchbook.figures.parts import STYLE

DPI = 192
"""Twice the 96 pixels that a page has for an inch."""
CELLS = 20_000
"""Values of the largest panel that goes into a CSV; a stream of tokens has more, and is in the results."""
LONG = 420
"""Letters of an alternative text that a reader still listens to."""
HEAD = ("panel", "kind", "series", "x", "y", "value")


class About(NamedTuple):
    """What a figure is, for those who read it, hear it, or look for it in the paper."""

    name: str
    """Function that drew it."""
    items: tuple[str, ...]
    """The paper's figures that it draws."""
    caption: str
    """What to see, in one or two sentences that hold for any run."""


def figure_of(*items: str, caption: str) -> Callable[[Callable[..., Figure]], Callable[..., Figure]]:
    """Name the paper's figures that a function draws, none for one that the paper does not have.

    The function draws in the style of the book, and its figure carries `about` (`About`).
    """

    def mark(function: Callable[..., Figure]) -> Callable[..., Figure]:
        @wraps(function)
        def draw(*arguments: object, **options: object) -> Figure:
            _settle_backend()
            with plt.rc_context(STYLE):
                figure = function(*arguments, **options)
            figure.about = About(function.__name__, items, caption)
            show_in_kernel()
            return figure

        draw.figure_of, draw.caption = items, caption
        return draw

    return mark


@cache
def _settle_backend() -> None:
    # chosen with the first figure, it would turn the display of figures on inside `rc_context`, which turns
    # it off again for all that follow
    plt.switch_backend(plt.get_backend())


def bundle(figure: Figure) -> tuple[dict[str, str], dict[str, Any]]:
    """Return a figure as Jupyter's forms of one output, and what is said of it."""
    with plt.rc_context(STYLE):  # ticks are made when they are drawn
        data = {"image/png": _written(figure, "png")}
        about = getattr(figure, "about", None)
        if about is None:
            return data | {"text/plain": repr(figure)}, {}
        data["application/pdf"] = _written(figure, "pdf")
    data["text/csv"] = as_csv(figure)
    data["text/plain"] = f"{about.caption} {described(figure)}"
    said = {"inches": [round(float(side), 3) for side in figure.get_size_inches()]}
    said |= {"name": about.name, "items": list(about.items), "caption": about.caption}
    return data, {FIGURE: said | {"alt": described(figure), "smallest": smallest_text(figure)}}


def show_in_kernel() -> None:
    """Let this process display figures by `bundle`, if it is a notebook's."""
    try:
        from IPython import get_ipython
    except ImportError:
        return
    shell = get_ipython()
    if shell is None or not hasattr(shell, "kernel"):
        return
    shell.display_formatter.mimebundle_formatter.for_type(Figure, lambda figure, **_: bundle(figure))
    # a form that is registered for a type goes before the bundle's; matplotlib's is, with its first figure
    for kind in ("image/png", "image/jpeg", "image/svg+xml", "application/pdf"):
        shell.display_formatter.formatters[kind].pop(Figure, None)


def smallest_text(figure: Figure) -> float:
    """Return the points of the smallest text that is seen."""
    return min((text.get_fontsize() for text in texts(figure)), default=float("inf"))


def texts(figure: Figure) -> list[Text]:
    """List the texts that are drawn, ticks among them."""
    figure.draw_without_rendering()
    hidden = {
        id(text)
        for axis in figure.findobj(Axes)
        if not axis.axison
        for side in (axis.xaxis, axis.yaxis)
        for text in side.findobj(Text)
    }
    return [
        text
        for text in figure.findobj(Text)
        if text.get_visible() and text.get_text().strip() and id(text) not in hidden
    ]


def as_csv(figure: Figure) -> str:
    """Write the numbers that a figure draws: a line for each point, bar, cell or picture."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(HEAD)
    for number, axis in enumerate(_axes(figure), 1):
        writer.writerows(_numbers(axis, _title(axis) or f"panel {number}"))
    return out.getvalue()


def described(figure: Figure) -> str:
    """Say in words what a figure shows, panel by panel, as far as one listens."""
    panels = [said for axis in _axes(figure) if (said := _said(axis))]
    pictures = [said for said in panels if said.startswith("picture")]
    rest = [said for said in panels if not said.startswith("picture")]
    labels = list(dict.fromkeys(said.removeprefix("picture ").strip() for said in pictures))
    if pictures:
        named = ", ".join(label for label in labels if label)
        count = f"{len(pictures)} pictures" if len(pictures) > 1 else "A picture"
        rest.insert(0, f"{count}: {named}" if named else count)
    headings = [text.get_text() for text in figure.texts] + [
        sub._suptitle.get_text() for sub in (figure, *figure.subfigs) if sub._suptitle is not None
    ]
    words = "; ".join(" ".join(part.split()) for part in [*headings, *dict.fromkeys(rest)] if part.strip())
    return words if len(words) <= LONG else words[:LONG].rsplit(" ", 1)[0].rstrip(",;") + " …"


def _written(figure: Figure, form: str) -> str:
    out = io.BytesIO()
    # dates would make two runs differ
    metadata = {"Software": None} if form == "png" else {"CreationDate": None, "Creator": None}
    figure.savefig(out, format=form, dpi=DPI, facecolor="white", metadata=metadata)
    return base64.b64encode(out.getvalue()).decode()


def _axes(figure: Figure) -> list[Axes]:
    """List the panels; the bar of colours beside one is not of them."""
    return [axis for axis in figure.findobj(Axes) if axis.get_label() != "<colorbar>"]


def _title(axis: Axes) -> str:
    """Return the first line of a panel's title; what stands below it is about its numbers."""
    titles = (axis.get_title(loc).split("\n")[0] for loc in ("left", "center", "right"))
    return " ".join(" ".join(titles).split())


def _picture(values: np.ndarray) -> bool:
    return values.ndim == 3


def _numbers(axis: Axes, panel: str) -> Iterator[tuple]:
    """List what a panel draws as rows of HEAD."""
    for image in axis.images:
        values = np.asarray(image.get_array())
        if _picture(values):
            yield panel, "picture", _words(axis), "", "", ""
        elif values.size > CELLS:
            yield panel, f"{values.shape[0]} × {values.shape[1]} values, not listed", "", "", "", ""
        else:
            columns, rows = _names(axis.xaxis, values.shape[1]), _names(axis.yaxis, values.shape[0])
            for (i, j), value in np.ndenumerate(values):
                yield panel, "cell", "", columns[j], rows[i], _short(value)
    for line in axis.lines:
        x, y = (np.atleast_1d(side) for side in line.get_data(orig=True))
        names = _names(axis.xaxis) if line.get_transform() == axis.transData else {}
        for a, b in zip(x, y, strict=True):
            yield panel, "line", _series(line), names.get(a, _short(a)), _short(b), ""
    for bars in (found for found in axis.containers if isinstance(found, BarContainer)):
        sideways = bars.orientation == "horizontal"
        names = _names(axis.yaxis if sideways else axis.xaxis)
        for bar in bars:
            at = bar.get_y() + bar.get_height() / 2 if sideways else bar.get_x() + bar.get_width() / 2
            size = bar.get_width() if sideways else bar.get_height()
            yield panel, "bar", _series(bars), names.get(round(at), _short(at)), _short(size), ""
    for steps in (found for found in axis.patches if isinstance(found, StepPatch)):
        for low, value in zip(steps.get_data().edges[:-1], steps.get_data().values, strict=True):
            yield panel, "step", _series(steps), _short(low), _short(value), ""
    for drawn in axis.collections:
        if isinstance(drawn, PathCollection):
            shade = drawn.get_array()
            for place, (x, y) in enumerate(drawn.get_offsets()):
                yield (
                    panel, "point", _series(drawn), _short(x), _short(y),
                    "" if shade is None else _short(shade[place]),
                )  # fmt: skip
        elif isinstance(drawn, LineCollection):
            for segment in drawn.get_segments():
                (x0, y0), (x1, y1) = segment[0], segment[-1]
                level = y0 == y1
                yield (
                    panel, "interval" if level else "line", _series(drawn),
                    *((f"{_short(x0)} to {_short(x1)}", _short(y0), "") if level
                      else (_short(x0), f"{_short(y0)} to {_short(y1)}", "")),
                )  # fmt: skip
        elif isinstance(drawn, PolyCollection):  # a band
            for x, y in (drawn.get_paths()[0].vertices if drawn.get_paths() else ())[:-1]:
                yield panel, "edge of a band", _series(drawn), _short(x), _short(y), ""


def _series(artist: Any) -> str:
    return "" if _hidden(artist) else str(artist.get_label())


def _names(side: Any, count: int = 0) -> Any:
    """Return the names of whole places on an axis, by place; of the first `count`, if it is given."""
    written = dict(zip(side.get_ticklocs(), (t.get_text() for t in side.get_ticklabels()), strict=False))
    fixed = type(side.get_major_formatter()).__name__ in (
        "FixedFormatter",
        "StrCategoryFormatter",
        "FuncFormatter",
    )
    named = {at: " ".join(text.split()) for at, text in written.items() if fixed and text}
    return [named.get(place, place) for place in range(count)] if count else named


def _words(axis: Axes) -> str:
    """Join what is written below or above a picture."""
    found = [text.get_text() for text in axis.texts] + [axis.get_xlabel(), _title(axis)]
    return " ".join(re.sub(r"\s+", " ", word) for word in found if word.strip())


def _short(value: Any) -> str:
    try:
        return f"{float(value):.6g}"
    except (TypeError, ValueError):
        return str(value)


def _said(axis: Axes) -> str:
    """Say what a panel shows; empty for a panel that shows nothing."""
    if any(_picture(np.asarray(image.get_array())) for image in axis.images):
        return f"picture {_words(axis)}"
    sides = " over ".join(filter(None, (axis.get_ylabel(), axis.get_xlabel())))
    parts = []
    for line in axis.lines:
        name, (x, y) = str(line.get_label()), (np.atleast_1d(side) for side in line.get_data(orig=True))
        if not name.startswith("_"):
            rise = f"from {_brief(y[0])} to {_brief(y[-1])}"
            parts.append(f"{name} {rise}" if len(y) > 1 else f"{name} at {_brief(x[0])}, {_brief(y[0])}")
    for bars in (found for found in axis.containers if isinstance(found, BarContainer)):
        parts.append(f"{len(bars)} bars {_named(bars)}".strip())
    points = sum(
        len(found.get_offsets()) for found in axis.collections if isinstance(found, PathCollection)
    )
    if points:
        parts.append(f"{points:,} points")
    for image in axis.images:
        rows, columns = np.asarray(image.get_array()).shape[:2]
        parts.append(f"a table of {rows} rows and {columns} columns in shades")
    names = [str(handle.get_label()) for handle in axis.containers if not _hidden(handle)]
    if not parts and names:
        parts.append(", ".join(names))
    if not (parts or axis.collections or axis.patches):
        return ""
    return ": ".join(filter(None, (_title(axis), ": ".join(filter(None, (sides, ", ".join(parts)))))))


def _hidden(artist: Any) -> bool:
    return str(artist.get_label() or "_").startswith("_")


def _named(bars: BarContainer) -> str:
    return "" if _hidden(bars) else f"of {bars.get_label()}"


def _brief(value: Any) -> str:
    return f"{float(value):.3g}"
