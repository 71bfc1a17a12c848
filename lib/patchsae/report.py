"""What a run says about each figure and table of the paper, collected from the executed notebooks.

A cell that makes a figure or table displays a `finding`: the reader sees it below the figure, and the
build finds it again in the notebook's outputs, so the report holds no number that a cell did not compute.
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nbformat

from patchsae.errors import PatchSAEError

if TYPE_CHECKING:  # the build reads findings without waiting for torch
    from patchsae.evaluation import Interval

KEY = "patchsae"
"""Where a finding stands in its output's metadata; as a MIME type of its own the book would warn of it."""

ITEMS = {
    "Fig. 1": "Overview",
    "Fig. 2": "Analysing latents, from a patch to a data set",
    "Fig. 3": "Statistics of latents and reference images",
    "Fig. 4": "One class in two domains",
    "Fig. 5": "Top-k latent masking",
    "Fig. 6": "The same latents, another answer",
    "Fig. 7": "Regions of the scatter",
    "Fig. 8": "Trained on the CLS token or on all tokens",
    "Fig. 9": "Autoencoders on different layers",
    "Fig. 10": "The same latents on other data sets",
    "Fig. 11": "Autoencoders trained on CLIP and on MaPLe",
    "Fig. 12": "Interactive demo",
    "Fig. 13": "Multimodal latents",
    "Fig. 14": "The latent typical of each data set",
    "Fig. 15": "Masking, base classes",
    "Fig. 16": "Masking, novel classes",
    "Fig. 17": "Three groups of latents",
    "Fig. 18": "Case study on EuroSAT",
    "Fig. 19": "Case studies on DTD and UCF101",
    "Fig. 20": "Counts of all data sets, before and after",
    "Fig. 21": "Confusion matrices",
    "Fig. 22": "More cases of Fig. 6",
    "Table 1": "Groups of latents and accuracy on eleven data sets",
    "Table 2": "Training choices",
}
"""The paper's figures and tables and what each is about."""


class Verdict(StrEnum):
    """Whether the paper's statement holds in a run."""

    REPRODUCED = "reproduced"
    DIFFERS = "differs"
    PAPER_SCALE = "needs paper scale"
    """The embedded scale cannot decide it."""
    OPEN = "not decided"
    """The interval holds both answers, or this run lacks something, such as object masks."""


@dataclass(frozen=True)
class Finding:
    """One row of the report."""

    id: str
    """A key of ITEMS."""
    label: str
    """Target of the cell that makes the figure or table, in the same notebook."""
    claim: str
    """What the paper shows, in one sentence."""
    quantity: str
    """What the numbers are."""
    unit: str
    paper: float | None
    """The paper's number of this quantity, None where it prints none."""
    ours: float | None
    interval: tuple[float, float] | None
    """95 % interval of `ours`."""
    rule: str
    """When the claim counts as holding, after 'Holds if'."""
    verdict: Verdict
    why: str
    """Why the verdict is not 'reproduced', or what else to know."""

    def __str__(self) -> str:
        return (
            f"{self.id}, {self.verdict}: {self.quantity}: paper {self.number(self.paper)}, "
            f"this run {self.measured()}. {self.why}".rstrip()
        )

    def number(self, value: float | None) -> str:
        """Write a number with its unit, or a dash."""
        return "–" if value is None else f"{_written(value, '.4g')}{self._unit()}"

    def measured(self) -> str:
        """Write this run's number with its interval, to three digits of the largest of them."""
        if self.interval is None:
            return self.number(self.ours)
        largest = max(map(abs, (self.ours, *self.interval)))
        digits = max(0, 2 - math.floor(math.log10(largest))) if largest else 0
        value, low, high = (_written(number, f".{digits}f") for number in (self.ours, *self.interval))
        return f"{value} [{low}, {high}]{self._unit()}"

    def _unit(self) -> str:
        return f" {self.unit}" if self.unit else ""

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> tuple[dict, dict]:
        return {"text/plain": str(self), "text/html": self._card()}, {KEY: asdict(self)}

    def _card(self) -> str:
        kind = self.verdict.value.replace(" ", "-")
        paper = "no number" if self.paper is None else self.number(self.paper)
        lines = [
            f'<div class="finding finding-{kind}" data-finding="{self.id}">',
            f"<p><strong>{self.id}: {self.verdict}.</strong> {html.escape(self.claim)}</p>",
            f"<p>Compared: {html.escape(self.quantity)}. Paper: {paper}; "
            f"this run: <strong>{self.measured()}</strong>.</p>",
            f"<p>Holds if {html.escape(self.rule)}.</p>",
            f"<p>{html.escape(self.why)}</p>" if self.why else "",
            "</div>",
        ]
        return "".join(lines)


def _written(value: float, form: str) -> str:
    """Write a number with a real minus, and zero without one."""
    text = f"{value:{form}}"
    return text.replace("-", "−") if float(text) else text.lstrip("-")


def finding(
    item: str,
    *,
    claim: str,
    quantity: str,
    ours: Interval | float | None,
    rule: str,
    verdict: bool | Verdict,
    why: str = "",
    unit: str = "",
    paper: float | None = None,
    label: str = "",
) -> Finding:
    """State what this run says about one figure or table of the paper, as the last value of a cell.

    Parameters
    ----------
    ours : number in `unit`, alone or with its interval; what is not finite becomes None
    rule : when the claim counts as holding, to be read after "Holds if"
    verdict : whether the claim holds in this run, or that this cannot be told
    why : needed unless the claim holds
    label : target of the cell, `fig-3` for "Fig. 3" where left out

    Raises PatchSAEError for an item that the paper does not have, and for a missing reason.
    """
    if item not in ITEMS:
        raise PatchSAEError(f"The paper has no '{item}': give one of {', '.join(ITEMS)}.")
    if isinstance(verdict, Verdict):
        judged = verdict
    else:
        judged = Verdict.REPRODUCED if verdict else Verdict.DIFFERS
    if judged is not Verdict.REPRODUCED and not why:
        raise PatchSAEError(f"{item} is judged '{judged}' without a reason: say why.")
    value, interval = ours, None
    if isinstance(ours, tuple):
        value, interval = ours[0], (float(ours[1]), float(ours[2]))
    if value is not None and not math.isfinite(value):
        value = None
    if value is None or interval and not all(math.isfinite(end) for end in interval):
        interval = None
    value = None if value is None else float(value)
    name = label or label_of(item)
    return Finding(item, name, claim, quantity, unit, paper, value, interval, rule, judged, why)


def above(found: Interval, bound: float = 0.0) -> Verdict:
    """Judge that something is larger than a bound: by its interval, which may leave it open."""
    if found.low > bound:
        return Verdict.REPRODUCED
    return Verdict.DIFFERS if found.high < bound else Verdict.OPEN


def within(found: Interval, margin: float) -> Verdict:
    """Judge that something is within a margin either way: by its interval, which may leave it open."""
    if -margin < found.low and found.high < margin:
        return Verdict.REPRODUCED
    return Verdict.DIFFERS if found.low > margin or found.high < -margin else Verdict.OPEN


def label_of(item: str) -> str:
    """Return the target of an item's cell: 'fig-3' of 'Fig. 3', 'table-1' of 'Table 1'."""
    return re.sub(r"\W+", "-", item.lower())


def labels(notebook: nbformat.NotebookNode) -> list[str]:
    """List the targets `(name)=` of a notebook's text, in order."""
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    return re.findall(r"^\(([\w-]+)\)=$", text, flags=re.MULTILINE)


def collect(notebooks: Sequence[Path]) -> list[dict[str, Any]]:
    """Read the findings of executed notebooks: one row per item of the paper, in the paper's order.

    Each row holds the fields of `Finding` but `label`, and `cell`, '<notebook>#<label>'. Raises
    PatchSAEError if an item has no row or two, or if a row's label is not in its notebook.
    """
    rows: dict[str, dict[str, Any]] = {}
    for path in notebooks:
        notebook = nbformat.read(path, as_version=4)
        targets = labels(notebook)
        outputs = (out for cell in notebook.cells for out in cell.get("outputs", ()))
        for found in (out["metadata"][KEY] for out in outputs if KEY in out.get("metadata", {})):
            row = dict(found)
            item, label = row["id"], row.pop("label")
            if item in rows:
                raise PatchSAEError(
                    f"{path.name} reports {item}, but {rows[item]['cell']} does too: keep one."
                )
            if label not in targets:
                raise PatchSAEError(
                    f"{path.name} reports {item} but has no target ({label})=: put it above the cell."
                )
            rows[item] = {"id": item, "cell": f"{path.name}#{label}"} | row
    missing = [item for item in ITEMS if item not in rows]
    if missing:
        raise PatchSAEError(f"No notebook reports {', '.join(missing)}: end its cell with a finding.")
    return [rows[item] for item in ITEMS]
