"""Findings collected from executed notebooks, and how many there are of each verdict."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from patchbook.lessons import lessons_of
from patchbook.report import BEYOND, ITEMS, KEY, Verdict
from patchsae.runs.errors import PatchSAEError

if TYPE_CHECKING:
    import nbformat  # it takes two seconds, and figures need this module too

FIGURE = "patchsae-figure"
"""Where an output's metadata say what a figure is."""


def targets(text: str) -> list[str]:
    """List the targets `(name)=` of a text, in order."""
    return re.findall(r"^\(([\w-]+)\)=$", text, flags=re.MULTILINE)


def labels(notebook: nbformat.NotebookNode) -> list[str]:
    """List the targets `(name)=` of a notebook's text, in order."""
    return targets("\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown"))


def collect_lessons(notebooks: Sequence[Path]) -> list[dict[str, Any]]:
    """Read the main result of each executed notebook that names one: its text and its cell.

    The main result is the sentence of the lowest rank.
    """
    said = {path.name: lessons_of(path) for path in notebooks}
    return [
        {"text": lessons[0].text, "cell": f"{name}#{lessons[0].label}"}
        for name, lessons in said.items()
        if lessons
    ]


def collect(notebooks: Sequence[Path]) -> list[dict[str, Any]]:
    """Read the findings of executed notebooks: one row per item of the paper, in the paper's order.

    Each row holds the fields of `Finding` but `label`, and `cell`, '<notebook>#<label>'. Rows beyond the
    paper are not among them. Raises PatchSAEError if an item has no row or two, or if a row's label is not
    in its notebook.
    """
    rows = _collected(notebooks, KEY)
    missing = [item for item in ITEMS if item not in rows]
    if missing:
        raise PatchSAEError(f"No notebook reports {', '.join(missing)}: end its cell with a finding.")
    return [rows[item] for item in ITEMS]


def collect_beyond(notebooks: Sequence[Path]) -> list[dict[str, Any]]:
    """Read the rows beyond the paper of executed notebooks, in the order of the book; there may be none.

    Each holds the fields of `Beyond` but `label`, and `cell`. Raises PatchSAEError if two have one name, or
    if a row's label is not in its notebook.
    """
    return list(_collected(notebooks, BEYOND).values())


def _collected(notebooks: Sequence[Path], key: str) -> dict[str, dict[str, Any]]:
    """Read rows by their id from outputs' metadata."""
    import nbformat

    rows: dict[str, dict[str, Any]] = {}
    for path in notebooks:
        notebook = nbformat.read(path, as_version=4)
        targets = labels(notebook)
        outputs = (out for cell in notebook.cells for out in cell.get("outputs", ()))
        for found in (out["metadata"][key] for out in outputs if key in out.get("metadata", {})):
            row = dict(found)
            item, label = row.pop("id"), row.pop("label")
            if item in rows:
                raise PatchSAEError(
                    f"{path.name} reports {item}, but {rows[item]['cell']} does too: keep one."
                )
            if label not in targets:
                raise PatchSAEError(
                    f"{path.name} reports {item} but has no target ({label})=: put it above the cell."
                )
            rows[item] = {"id": item, "cell": f"{path.name}#{label}"} | row
    return rows


def count_verdicts(rows: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Count the verdicts of the rows that can fail: each verdict of `Verdict`, in its order."""
    counted = Counter(row["verdict"] for row in rows if row["can_fail"])
    return {str(verdict): counted[verdict] for verdict in Verdict}
