"""What a chapter has learned: said where it is found, and again where the chapter opens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from patchbook.report import Finding, Verdict

if TYPE_CHECKING:  # a chapter says its lessons without it, and its import takes over a second
    import nbformat

KEY = "patchsae-lesson"
"""Where a lesson stands in its output's metadata."""
TITLE = "## What we learned"


@dataclass(frozen=True)
class Lesson:
    """One sentence that a run has found out, as the last value of a cell."""

    text: str
    """In Markdown."""
    label: str
    """Target `(label)=` of the section that shows it."""
    rank: int = 1
    """Its place where the chapter opens; the first is the main result."""

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> tuple[dict, dict]:
        shown = {"text/plain": self.text, "text/markdown": f"**In short.** {self.text}"}
        return shown, {KEY: asdict(self)}


def lesson(found: Finding, rank: int, *, holds: str, fails: str, open_: str) -> Lesson:
    """Say what a finding means, by its verdict; `{}` is its number with its interval."""
    text = {Verdict.REPRODUCED: holds, Verdict.DIFFERS: fails}.get(found.verdict, open_)
    return Lesson(text.replace("{}", found.measured()), found.label, rank)


def read_lessons(notebook: nbformat.NotebookNode) -> list[Lesson]:
    """Return the lessons of an executed notebook, the main result first."""
    outputs = [out for cell in notebook.cells for out in cell.get("outputs", ())]
    found = [Lesson(**out["metadata"][KEY]) for out in outputs if KEY in out.get("metadata", {})]
    return sorted(found, key=lambda one: one.rank)


def lessons_of(path: str | Path) -> list[Lesson]:
    """Return the lessons of an executed notebook's file."""
    import nbformat

    return read_lessons(nbformat.read(path, as_version=4))


def put_first(notebook: nbformat.NotebookNode) -> None:
    """Open an executed notebook with its lessons, right below its title; one without any stays as it is."""
    import nbformat

    if found := read_lessons(notebook):
        cell = nbformat.v4.new_markdown_cell(_section(found), id="what-we-learned")
        notebook.cells.insert(1, cell)


def _section(found: Sequence[Lesson]) -> str:
    lines = [f"{n}. {one.text} {{ref}}`Shown here <{one.label}>`." for n, one in enumerate(found, 1)]
    return "\n".join([TITLE, "", *lines])
