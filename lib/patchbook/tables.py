"""Tables for people: a caption, the estimate in the cell and its interval in small print beside it."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

import pandas as pd

from patchsae.runs.intervals import Interval

Key = str | tuple[str, ...]


class Estimate(NamedTuple):
    """A number as it is written, and its interval."""

    value: str
    span: str = ""

    def __str__(self) -> str:
        return f"{self.value} {self.span}".rstrip()


def estimate(found: Sequence[float], digits: int = 2, unit: float = 1.0) -> Estimate:
    """Write value, low and high with so many digits after the point, all three times `unit`."""
    value, low, high = (fixed(unit * part, digits) for part in found)
    return Estimate(value, f"[{low}, {high}]")


def percent(found: Sequence[float], digits: int = 1) -> Estimate:
    """Write shares, value, low and high, in percent."""
    return estimate(found, digits, 100.0)


def in_percent(found: Interval) -> Interval:
    """Return an interval of shares in percent."""
    return Interval(*(100 * part for part in found))


def fixed(value: float, digits: int = 0, sign: bool = False) -> str:
    """Write a number with so many digits after the point, a real minus, and no minus before zero."""
    if not math.isfinite(value):
        return "–"
    text = f"{value:{'+' if sign else ''},.{digits}f}"
    return text.replace("-", "−") if float(text.replace(",", "")) else text.lstrip("-")


def plain(value: object) -> str:
    """Write any number for people: whole ones in full, others to three digits, none in powers of ten."""
    if value is None or isinstance(value, float) and math.isnan(value):
        return ""
    if isinstance(value, (bool, str, Estimate)) or not hasattr(value, "__float__"):
        return str(value)
    number = float(value)
    if not math.isfinite(number):
        return "–"
    if number == int(number):
        return fixed(number)
    return fixed(number, max(0, 2 - math.floor(math.log10(abs(number)))))


@dataclass(frozen=True)
class Table:
    """A table as the last value of a cell, in a page and in plain text.

    Keys of rows and of columns are names, or tuples of names where names are grouped.
    """

    caption: str
    rows: Mapping[Key, Mapping[Key, object]]
    """By row and column: text, numbers, or `Estimate`s; a column that a row lacks is empty there."""
    heads: tuple[str, ...] = ("",)
    """What the names of rows are, one for each level."""
    folded: bool = False
    """Whether a reader has to open it; the caption is then what is seen."""

    def __str__(self) -> str:
        frame = pd.DataFrame({key: dict(row) for key, row in self.rows.items()}, columns=list(self.rows))
        frame = frame.reindex([key for key in self._columns()]).T
        return f"{self.caption}\n{frame.map(plain).to_string()}"

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        return {"text/plain": str(self), "text/html": self._page()}

    def _columns(self) -> list[Key]:
        return list(dict.fromkeys(key for row in self.rows.values() for key in row))

    def _page(self) -> str:
        caption = html.escape(self.caption)
        body = "".join([*self._head(), "<tbody>", *self._body(), "</tbody>"])
        if not self.folded:
            table = f'<table class="dataframe"><caption>{caption}</caption>{body}</table>'
            return f'<div class="results">{table}</div>'
        table = f'<table class="dataframe" aria-label="{caption}">{body}</table>'
        return f'<details class="results"><summary>{caption}</summary><div>{table}</div></details>'

    def _head(self) -> list[str]:
        columns = [_parts(key) for key in self._columns()]
        levels = max((len(key) for key in columns), default=1)
        columns = [key + ("",) * (levels - len(key)) for key in columns]
        lines = ["<thead>"]
        for level in range(levels):
            last = level == levels - 1
            corner = [_head(name if last else "", "col") for name in self.heads]
            cells = []
            # a name that spans several columns is one cell only below the same names
            for key, group in groupby(columns, lambda key, level=level: key[: level + 1]):
                cells.append(_head(key[level], "col" if last else "colgroup", colspan=len(list(group))))
            lines.append(f"<tr>{''.join(corner + cells)}</tr>")
        return [*lines, "</thead>"]

    def _body(self) -> list[str]:
        keys, lines = [_parts(key) for key in self.rows], []
        for at, (key, row) in enumerate(zip(keys, self.rows.values(), strict=True)):
            names = []
            for level in range(len(self.heads)):
                own = key[: level + 1]
                if at and keys[at - 1][: level + 1] == own and level < len(self.heads) - 1:
                    continue  # the name above reaches down here
                same = next((n for n, other in enumerate(keys[at:]) if other[: level + 1] != own), None)
                down = len(keys) - at if same is None else same
                down = down if level < len(self.heads) - 1 else 1
                names.append(_head(key[level] if level < len(key) else "", "row", rowspan=down))
            cells = [f"<td>{_cell(row.get(column, ''))}</td>" for column in self._columns()]
            lines.append(f"<tr>{''.join(names + cells)}</tr>")
        return lines


def _parts(key: Key) -> tuple[str, ...]:
    return tuple(map(str, key)) if isinstance(key, tuple) else (str(key),)


def _head(name: str, scope: str, **spans: int) -> str:
    """Return a header cell; one without a name is none, or a reader aloud would announce nothing."""
    span = "".join(f' {key}="{n}"' for key, n in spans.items() if n > 1)
    return f'<th scope="{scope}"{span}>{html.escape(name)}</th>' if name else f"<td{span}></td>"


def _cell(value: object) -> str:
    if isinstance(value, Estimate) and value.span:
        return f"{html.escape(value.value)} <small>{html.escape(value.span)}</small>"
    return html.escape(plain(value))
