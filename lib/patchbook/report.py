"""What a run says about each figure and table of the paper, collected from the executed notebooks.

A cell that makes a figure or table displays a `finding`: the reader sees it below the figure, and the
build finds it again in the notebook's outputs, so the report holds no number that a cell did not compute.
"""

from __future__ import annotations

import html
import math
import re
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from patchsae.runs.errors import PatchSAEError

if TYPE_CHECKING:  # the build reads findings without waiting for torch
    from patchsae.runs.intervals import Interval

KEY = "patchsae"
"""Where a finding stands in its output's metadata; as a MIME type of its own the book would warn of it."""
BEYOND = "patchsae-beyond"
"""Where a row beyond the paper stands there."""

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


class Answer(StrEnum):
    """Whether something that the paper does not say holds in a run."""

    HOLDS = "holds"
    FAILS = "does not hold"
    OPEN = "not decided"


ANSWERS = {
    Verdict.REPRODUCED: Answer.HOLDS,
    Verdict.DIFFERS: Answer.FAILS,
    Verdict.PAPER_SCALE: Answer.OPEN,
    Verdict.OPEN: Answer.OPEN,
}


class Reason(StrEnum):
    """Why a statement does not hold or cannot be told, in a word that can be counted."""

    FEW = "too few images"
    """Or latents: the interval holds both answers."""
    FEW_CLASSES = "too few classes"
    """Or data sets, which no number of images makes more."""
    CHANCE = "at chance"
    """Chance, or a control that knows nothing, does as well."""
    WEAK = "model too weak"
    """The model that is looked at cannot do what is asked about."""
    ABSENT = "effect absent"
    """What the paper sees is not there, or not of the size that the rule asks."""
    REVERSED = "effect reversed"
    """It is clearly the other way round."""
    PRESENT = "effect present"
    """The paper sees none, and here is one beyond the margin."""
    SHORT = "training too short"
    LACKING = "data lacking"
    """This run has not what the rule asks about: masks, a second data set, another model."""
    PAPER_SCALE = "needs paper scale"


@dataclass(frozen=True, kw_only=True)
class Row:
    """What a row of the report says, of the paper or beyond it."""

    id: str
    """Its name; of a `Finding` a key of ITEMS."""
    label: str
    """Target of the cell that makes the figure or table, in the same notebook."""
    quantity: str
    """What the numbers are."""
    unit: str
    ours: float | None
    interval: tuple[float, float] | None
    """95 % interval of `ours`."""
    rule: str
    """When the statement counts as holding, after 'Holds if'."""
    verdict: Verdict | Answer
    reason: Reason | None
    """Why it does not hold or is not decided; None where it holds."""
    why: str
    """The same as a sentence, or what else to know."""
    effect: float | None
    """How much it weighs, on a scale that is the same for small and large runs."""
    effect_name: str
    """What `effect` is, in one phrase."""

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

    def weighed(self) -> str:
        """Write the effect and what it is; empty where there is no number to weigh."""
        if not self.effect_name:
            return ""
        return f"{'–' if self.effect is None else _written(self.effect, '.3g')} ({self.effect_name})"

    def _unit(self) -> str:
        return f" {self.unit}" if self.unit else ""

    def _because(self) -> str:
        return f" ({self.reason})" if self.reason else ""


@dataclass(frozen=True, kw_only=True)
class Finding(Row):
    """What a run says about one figure or table of the paper."""

    claim: str
    """What the paper shows, in one sentence."""
    paper: float | None
    """The paper's number of this quantity, None where it prints none."""
    can_fail: bool
    """Whether a run could come out otherwise; what is true by construction is shown and not counted."""

    def __str__(self) -> str:
        effect = self.weighed()
        return (
            f"{self.id}, {self.verdict}{self._because()}: {self.quantity}: paper "
            f"{self.number(self.paper)}, this run {self.measured()}{effect and f', effect {effect}'}. "
            f"{self.why}".rstrip()
        )

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> tuple[dict, dict]:
        return {"text/plain": str(self), "text/html": self._card()}, {KEY: asdict(self)}

    def _card(self) -> str:
        paper = "no number" if self.paper is None else self.number(self.paper)
        judged = self.verdict if self.can_fail else f"{self.verdict}, true by construction"
        return _box(
            self,
            f'data-finding="{self.id}"',
            self.verdict.value.replace(" ", "-") if self.can_fail else "given",
            f"<strong>{self.id}: {judged}{self._because()}.</strong> {html.escape(self.claim)}",
            f"Paper: {paper}; this run",
        )


@dataclass(frozen=True, kw_only=True)
class Beyond(Row):
    """What a run says about something that the paper does not ask."""

    def __str__(self) -> str:
        effect = self.weighed()
        return (
            f"Beyond the paper, {self.id}, {self.verdict}{self._because()}: {self.quantity}: "
            f"{self.measured()}{effect and f', effect {effect}'}. {self.why}".rstrip()
        )

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> tuple[dict, dict]:
        return {"text/plain": str(self), "text/html": self._card()}, {BEYOND: asdict(self)}

    def _card(self) -> str:
        kind = {Answer.HOLDS: "reproduced", Answer.FAILS: "differs", Answer.OPEN: "not-decided"}
        return _box(
            self,
            f'data-beyond="{html.escape(self.id)}"',
            kind[self.verdict],
            f"<strong>Beyond the paper: {self.verdict}{self._because()}.</strong> {html.escape(self.id)}",
            "This run",
        )


def _box(row: Row, names: str, kind: str, title: str, before: str) -> str:
    effect = row.weighed()
    lines = [
        title,
        f"Compared: {html.escape(row.quantity)}. {before}: <strong>{row.measured()}</strong>.",
        f"Effect: {html.escape(effect)}." if effect else "",
        f"Holds if {html.escape(row.rule)}.",
        html.escape(row.why),
    ]
    shown = "".join(f"<p>{line}</p>" for line in lines if line)
    return f'<div class="finding finding-{kind}" {names}>{shown}</div>'


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
    reason: Reason | str | None = None,
    effect: float | None = None,
    effect_name: str = "",
    can_fail: bool = True,
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
    why, reason : needed unless the claim holds; `reason` is dropped where it holds
    effect, effect_name : what the result weighs, and what that number is in one phrase. The name is needed
        with a number that can fail; the effect is None where the run has no spread to measure it by
    can_fail : False for what is true by construction: it is shown, and not counted
    label : target of the cell, `fig-3` for "Fig. 3" where left out

    Raises PatchSAEError for an item that the paper does not have, for a missing reason or effect, and for
    an effect that is not finite.
    """
    if item not in ITEMS:
        raise PatchSAEError(f"The paper has no '{item}': give one of {', '.join(ITEMS)}.")
    judged = _verdict(verdict)
    common = _checked(item, judged, ours, why, reason, effect, effect_name, can_fail)
    return Finding(
        id=item,
        label=label or label_of(item),
        claim=claim,
        quantity=quantity,
        unit=unit,
        paper=paper,
        rule=rule,
        verdict=judged,
        can_fail=bool(can_fail),
        **common,
    )


def beyond(
    name: str,
    *,
    quantity: str,
    ours: Interval | float | None,
    rule: str,
    verdict: bool | Verdict,
    label: str,
    why: str = "",
    reason: Reason | str | None = None,
    effect: float | None = None,
    effect_name: str = "",
    unit: str = "",
) -> Beyond:
    """State what this run says about something that the paper does not ask, as the last value of a cell.

    The report lists it below the paper's figures and tables and apart from their counts.

    Parameters
    ----------
    name : the statement in one short sentence, without a number; each name once in the book
    verdict : judged like a `finding`; "reproduced" reads "holds" here, "differs" reads "does not hold"
    label : target `(label)=` above the cell

    The other parameters and what is refused are those of `finding`.
    """
    if not name or not label:
        raise PatchSAEError("A row beyond the paper needs a name and the label of its cell: give both.")
    judged = _verdict(verdict)
    common = _checked(name, judged, ours, why, reason, effect, effect_name)
    return Beyond(
        id=name,
        label=label,
        quantity=quantity,
        unit=unit,
        rule=rule,
        verdict=ANSWERS[judged],
        **common,
    )


def _verdict(given: bool | Verdict) -> Verdict:
    if isinstance(given, Verdict):
        return given
    return Verdict.REPRODUCED if given else Verdict.DIFFERS


def _checked(
    name: str,
    judged: Verdict,
    ours: Interval | float | None,
    why: str,
    reason: Reason | str | None,
    effect: float | None,
    effect_name: str,
    can_fail: bool = True,
) -> dict[str, Any]:
    """Return the fields that every row checks alike."""
    if judged is not Verdict.REPRODUCED and not why:
        raise PatchSAEError(f"{name} is judged '{judged}' without a reason: say why.")
    if judged is not Verdict.REPRODUCED and reason not in set(Reason):
        raise PatchSAEError(
            f"{name} is judged '{judged}' for the reason '{reason}': give as reason one of "
            f"{', '.join(Reason)}."
        )
    value, interval = _number(ours)
    if effect is not None and not math.isfinite(effect):
        raise PatchSAEError(
            f"The effect of {name} is {effect}: give a finite number, or None where the run has no spread "
            "to measure it by."
        )
    if not effect_name and (effect is not None or can_fail and value is not None):
        raise PatchSAEError(f"{name} has a number but no effect: give effect and effect_name.")
    return {
        "ours": value,
        "interval": interval,
        "why": why,
        "reason": None if judged is Verdict.REPRODUCED else Reason(reason),
        "effect": None if effect is None or value is None else float(effect),
        "effect_name": effect_name if value is not None else "",
    }


def _number(ours: Interval | float | None) -> tuple[float | None, tuple[float, float] | None]:
    """Split a number from its interval; what is not finite becomes None."""
    value, interval = ours, None
    if isinstance(ours, tuple):
        value, interval = ours[0], (float(ours[1]), float(ours[2]))
    if value is not None and not math.isfinite(value):
        value = None
    if value is None or interval and not all(math.isfinite(end) for end in interval):
        interval = None
    return (None if value is None else float(value)), interval


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
