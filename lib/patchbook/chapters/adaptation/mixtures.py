"""Remapping, or new concepts: which parts of MaPLe have its gain, and what the chapter says in the end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from patchbook.chapters.adaptation.accuracy import Pairs
from patchbook.chapters.adaptation.groups import correlations
from patchbook.chapters.adaptation.ranked import Ranked
from patchbook.chapters.adaptation.tasks import CLIP, MAPLE, Adaptation, Task, pooled
from patchbook.lessons import Lesson
from patchbook.report import Verdict, above
from patchbook.tables import Table, fixed, percent
from patchsae.adaptation.remapping import PARTS, Parts
from patchsae.runs.intervals import Interval, bootstrap, difference_of_shares, share_of_gain

NAMED = {
    "words": Parts(0, 0, 1), "prompt tokens": Parts(0, 1, 0), "stream": Parts(1, 0, 0),
    "words + prompt tokens": Parts(0, 1, 1), "stream + prompt tokens": Parts(1, 1, 0),
    "stream + words": Parts(1, 0, 1),
}  # fmt: skip
MAPPING, STREAM, WORDS = NAMED["words + prompt tokens"], NAMED["stream"], NAMED["words"]
ALL = "all with a clear gain"
WAYS = {False: "Tokens as they are", True: "Through latents"}


class Divided(NamedTuple):
    """How a clear gain divides, as shares of it."""

    mapping: Interval
    """CLIP's stream with MaPLe's words and prompt tokens."""
    words: Interval
    """With its words alone."""
    stream: Interval
    """MaPLe's stream with CLIP's other parts."""
    more: Interval
    """Mapping minus stream, on the same images."""

    @property
    def verdict(self) -> Verdict:
        """Say whether the larger part is in the mapping, as the paper says."""
        return above(self.more)

    def __str__(self) -> str:
        verdict = {
            Verdict.REPRODUCED: "the larger part is in the mapping, as the paper says",
            Verdict.DIFFERS: "the larger part is in what is seen, against the paper",
            Verdict.OPEN: "neither part has clearly more of it",
        }[self.verdict]
        return (
            f"with CLIP's stream, MaPLe's words and prompt tokens keep {percent(self.mapping, 0)} % of the "
            f"gain, its words alone {percent(self.words, 0)} %; MaPLe's stream with CLIP's other parts "
            f"keeps {percent(self.stream, 0)} %. Mapping minus stream: {percent(self.more, 0)}, so "
            f"**{verdict}**."
        )


def divide(by_parts: Mapping[Parts, np.ndarray], seed: int) -> Divided:
    """Divide a gain among parts: [N] right or wrong of every mixture, on the same images."""
    ends = by_parts[CLIP], by_parts[MAPLE]
    mapping, words, stream = (share_of_gain(*ends, by_parts[p], seed) for p in (MAPPING, WORDS, STREAM))
    more = difference_of_shares(*ends, by_parts[MAPPING], by_parts[STREAM], seed)
    return Divided(mapping, words, stream, more)


class Mixtures(NamedTuple):
    """What mixtures of parts keep of the gain, with tokens as they are or through latents."""

    way: str
    rows: dict[str, dict[str, object]]
    shares: dict[str, dict[str, Interval]]
    """By group of data sets and part, where there is a clear gain to divide."""
    divided: Divided | None
    conclusion: str


def mix(a: Adaptation, latents: bool) -> Mixtures:
    """Divide the gain of the data sets whose gain is clear, on images that did not choose them."""
    seed, rows, shares, divided = a.run.seed, {}, {}, None
    clear = [name for name in a.by_gain if a.choosing[latents][name].low > 0]
    conclusion = "no data set has a clear gain to divide."
    groups = {ALL: clear} | {a.tasks[name].title: [name] for name in clear[:4]} if clear else {}
    for title, names in groups.items():
        members = [a.tasks[name] for name in names]
        by_parts = {parts: _right(members, parts, latents) for parts in PARTS}
        whole = bootstrap(by_parts[MAPLE] - by_parts[CLIP], seed)
        rows[title], found = _line(members, by_parts, whole, seed)
        if found:
            shares[title] = found
        if title == ALL:
            divided = divide(by_parts, seed) if whole.low > 0 else None
            conclusion = str(divided) if divided else (
                f"the gain is {percent(whole)} points on images that did not choose the sets, which is no "
                "clear gain to divide."
            )  # fmt: skip
    return Mixtures(WAYS[latents], rows, shares, divided, f"{WAYS[latents]}: {conclusion}")


def _right(members: Sequence[Task], parts: Parts, latents: bool) -> np.ndarray:
    return pooled([t.right("base", parts, latents)[~t.chooses] for t in members])


def _line(
    members: Sequence[Task], by_parts: Mapping[Parts, np.ndarray], whole: Interval, seed: int
) -> tuple[dict[str, object], dict[str, Interval]]:
    images = [(~t.chooses).sum() for t in members]
    chance = np.average([t.halves["base"].chance for t in members], weights=images)
    row = {
        "chance %": fixed(100 * chance, 1),
        "CLIP %": fixed(100 * by_parts[CLIP].mean(), 1),
        "MaPLe %": fixed(100 * by_parts[MAPLE].mean(), 1),
        "gain, points": percent(whole),
    }
    shares = {}
    for label, parts in NAMED.items():
        kept = "no clear gain to divide"
        if whole.low > 0:
            shares[f"MaPLe's {label}"] = share_of_gain(
                by_parts[CLIP], by_parts[MAPLE], by_parts[parts], seed
            )
            kept = percent(shares[f"MaPLe's {label}"], 0)
        row[f"MaPLe's {label}, %"] = fixed(100 * by_parts[parts].mean(), 1)
        row[f"… % of the gain, {label}"] = kept
    return row, shares


def mixture_table(found: Mixtures) -> Table | None:
    """Return accuracy of each mixture and its share of the gain, by group of data sets; None without."""
    if not found.rows:
        return None
    lines = dict.fromkeys(key for row in found.rows.values() for key in row)
    rows = {line: {title: row.get(line, "") for title, row in found.rows.items()} for line in lines}
    caption = f"{found.way}: accuracy of mixtures of CLIP's and MaPLe's parts, base classes."
    return Table(caption, rows, ("",), folded=True)


def summary(
    a: Adaptation, ranked: Ranked, pairs: Pairs | None, mixtures: Sequence[Mixtures], others: Sequence[str]
) -> list[str]:
    """Return what the run says of adaptation, sentence by sentence."""
    off, r = {t.title: t.off_diagonal.mean() for t in a.tasks.values()}, correlations(a)
    gain, novel = a.over_sets(Task.moved), a.over_sets(lambda t: t.moved("novel"))
    return [
        f"The largest gain on base classes is on {a.lead.title}, {percent(a.gain[a.by_gain[0]])} points; "
        f"the most latents leave the diagonal on {max(off, key=off.get)}, and the correlation of counts is "
        f"lowest on {min(r, key=r.get)}.",
        f"Over all data sets of this run base classes gain {percent(gain)} points and novel ones change by "
        f"{percent(novel)}.",
        *([pairs.unseen.judged.why] if pairs else []),
        *(found.conclusion for found in mixtures),
        *others,
        "Masked to the top k, on base and on novel classes, accuracy changes by "
        f"{_both(ranked.change('ranks'))} points if MaPLe ranks the latents, and by "
        f"{_both(ranked.change('classifies'))} if MaPLe classifies.",
    ]


def _both(found: Mapping[str, Interval]) -> str:
    return " and ".join(str(percent(change)) for change in found.values())


def remapping_lesson(mixtures: Sequence[Mixtures]) -> Lesson:
    """Say where the gain lies, with tokens as they are and, where that can be told, through latents."""
    found = mixtures[0].divided
    if not found:
        text = "No data set of this run has a clear gain, so it cannot be asked where one lies."
        return Lesson(text, "remapping", 1)
    where = {
        Verdict.REPRODUCED: "Most of the gain lies in how concepts are used, as the paper says",
        Verdict.DIFFERS: "Most of the gain lies in what is seen, not in how it is used, against the paper",
        Verdict.OPEN: "How the gain divides between what is seen and how it is used is not clear",
    }[found.verdict]
    text = (
        f"{where}: MaPLe's words and prompt tokens on CLIP's stream keep {percent(found.mapping, 0)} % of "
        f"it, MaPLe's stream alone {percent(found.stream, 0)} %"
    )
    seen = " Something else is seen, too." if found.stream.low > 0 else ""
    through = [other.divided for other in mixtures[1:] if other.divided]
    rest = "".join(
        f" Through the latents it is {percent(d.mapping, 0)} and {percent(d.stream, 0)} %." for d in through
    )
    return Lesson(f"{text}.{seen}{rest}", "remapping", 1)
