"""Chapter 6: would another seed have found the same latents, and have autoencoders learned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from patchbook.chapters.against_untrained import Learned, measure
from patchbook.chapters.learned import table as goals
from patchbook.chapters.opening import Run
from patchbook.chapters.probes import Probes, open_probes
from patchbook.chapters.table2 import Ablation
from patchbook.lessons import Lesson
from patchbook.recipes import TWIN
from patchbook.tables import Estimate, Table, estimate, fixed
from patchsae.latents.stability import Against, matched_cosines, pairs, pw_mcc
from patchsae.runs.intervals import bootstrap
from patchsae.runs.stage import project_root
from patchsae.sae.model import SAE
from patchsae.training.trainer import Trained, read_metrics

ASKED = {"CLS token": ("CLS, default", "baseline (Fry)"), "all tokens": ("all tokens", TWIN)}
"""Rows of Table 2 and their twins from another seed."""
BOOK = "chapter 1"


class Matched(NamedTuple):
    """Cosines of a dictionary's latents with those of others, and how near it is to its start."""

    curves: dict[str, dict[str, np.ndarray]]
    """By dictionary and by what it is matched with."""
    rows: dict[tuple[str, str], dict[str, object]]
    longest: tuple[float, float]
    """How many times the tokens of the row on all tokens chapter 1's has seen, and how they match."""


def chapter_saes(run: Run) -> dict[str, Trained]:
    """Return chapter 1's autoencoder and, at the embedded scale, those of two more seeds."""
    seeds = 3 if run.has_masks else 1  # at the paper's scale one training is long enough
    return {
        f"seed {number}": run.setup.trained_sae(
            run.sets.train, run.backbone, run.root, run.changes.sae, run.changes.train | {"seed": number}
        )
        for number in range(run.seed, run.seed + seeds)
    }


def match(found: Ablation, chapter: Mapping[str, Trained], latents: int) -> Matched:
    """Match decoders one to one with those of another seed, with chance, and with their own start."""
    seed, curves, rows = found.run.seed, {}, {}
    own, *others = (run.sae for run in chapter.values())
    asked = {
        title: (
            *(SAE.load(found.run.root / found.rows[n].folder) for n in names),
            tuple(found.sweep.configs(found.designs[n])[1].seed for n in names),
        )
        for title, names in ASKED.items()
    }
    asked[BOOK] = (own, others[0] if others else None, (seed, seed + 1))
    for title, (first, other, seeds) in asked.items():
        curves[title] = {}
        for kind, (a, b) in pairs(first, other, seeds, latents, seed).items():
            values = matched_cosines(a, b)
            curves[title][str(kind)] = values
            rows[title, str(kind)] = {
                "matched cosine": estimate(bootstrap(values, seed), 3),
                "above 0.7, %": fixed(100 * (values > 0.7).mean(), 1),
                "PW-MCC": fixed(float(pw_mcc(a, b)), 3),
            }
    row = found.rows["all tokens"]
    seen = next(iter(chapter.values())).metrics[-1]["tokens"]
    seen /= read_metrics(found.run.root / row.folder)[-1]["tokens"]
    drawn, _ = pairs(own, None, (seed, seed + 1), latents, seed)[Against.START]
    shared = matched_cosines(drawn, SAE.load(found.run.root / row.folder).W_dec)
    return Matched(curves, rows, (float(seen), float(shared.mean())))


def match_table(found: Matched) -> Table:
    """Return the matches of every dictionary."""
    heads = ("trained on", "matched with")
    return Table("Matched latents, mean with 95 % interval over latents.", found.rows, heads, folded=True)


class Verdicts(NamedTuple):
    """What one dictionary's matches say."""

    start: float
    chance: float
    same: float | None
    """With another seed's; None where there is none."""

    @property
    def keeps_start(self) -> bool:
        """Tell whether the step from chance to another seed's is smaller than from there to the start."""
        return self.same is not None and self.start - self.same > self.same - self.chance


def judge(curves: Mapping[str, np.ndarray]) -> Verdicts:
    """Compare what a dictionary shares with another seed's, with chance and with its own start."""
    chance = max(float(curves[k].mean()) for k in (Against.UNTRAINED, Against.PERMUTED) if k in curves)
    same = float(curves[Against.SEED].mean()) if Against.SEED in curves else None
    return Verdicts(float(curves[Against.START].mean()), chance, same)


def match_lines(found: Matched) -> list[str]:
    """Say of every dictionary how two seeds match, and whether it has left its start behind."""
    lines, keep = [], []
    for title, curves in found.curves.items():
        told = judge(curves)
        if told.same is None:
            lines.append(
                f"**{title}**: own start {told.start:.2f}, chance {told.chance:.2f}; no second seed."
            )
            continue
        if told.keeps_start:
            keep.append(title)
        nearer = "it is still nearer to where it began than to the other seed's"
        verdict = nearer if told.start > told.same else "it has left its start behind"
        lines.append(
            f"**{title}**: two seeds match at {told.same:.2f}, chance at {told.chance:.2f}; with its own "
            f"start the dictionary matches at {told.start:.2f}, so {verdict}."
        )
    times, shared = found.longest
    if times > 1:  # the row is a short run, not chapter 1's own autoencoder
        lines.append(
            f"**Longer training**: the autoencoder of chapter 1 has seen {times:.3g} times the tokens of "
            f"the row on all tokens. The two match at {shared:.2f}."
        )
    if keep:
        lines.append(
            f"**In {len(keep)} of {len(found.curves)} dictionaries ({', '.join(keep)}) the step from "
            f"chance "
            "to the other seed's is smaller than the step from there to their own start**: most of each "
            "direction is what the random draw gave it."
        )
    return lines


def match_lesson(found: Matched) -> Lesson:
    """Say in one sentence whether another seed finds the latents of chapter 1's autoencoder."""
    told = judge(found.curves[BOOK])
    if told.same is None:
        text = "Whether another seed finds the same latents is not known here: one seed alone was trained."
        return Lesson(text, "stability", 1)
    moved = (
        "; it has left its start behind" if told.start <= told.same else "; it is nearer to its own start"
    )
    text = (
        f"Another seed finds latents that match those of chapter 1's autoencoder at a cosine of "
        f"{told.same:.2f}, where chance gives {told.chance:.2f}{moved} ({told.start:.2f})."
    )
    return Lesson(text, "stability", 1)


def learned(
    run: Run, chapter: Mapping[str, Trained], images: int, references: int
) -> dict[str, Learned] | None:
    """Measure chapter 1's autoencoder and the next seed's against untrained ones; None without masks."""
    if len(chapter) < 2:
        return None
    probes = open_probes(run.backbone, images, references, seed=run.seed)
    return run.keep(
        "learned", dict[str, Learned], lambda: _learned(run, chapter, probes),
        [probes.described, probes.scored, *probes.masked.values()],
        saes={name: one.folder.name for name, one in chapter.items()},
    )  # fmt: skip


def _learned(run: Run, chapter: Mapping[str, Trained], probes: Probes) -> dict[str, Learned]:
    saes = {name: one.sae for name, one in chapter.items()}
    asked = dict(list(saes.items())[:2])
    # rows that began as data have no start that seed and configuration would give
    random_start = str(run.setup.train.start) == "random"
    starts = {
        name: SAE(sae.config, run.seed + number) if random_start else None
        for number, (name, sae) in enumerate(asked.items())
    }
    with run.backbone.remembering(run.store):
        return measure(asked, run.backbone, probes, starts, list(saes.values())[2:], run.seed)


def goal_table(measured: Mapping[str, Learned]) -> Table:
    """Return every goal, what each autoencoder reaches, and who reaches it."""
    rows = {
        row["what"]: {key: _split(text) for key, text in row.items() if key != "what"}
        for row in goals(measured)
    }
    return Table("Measures, goals, and which autoencoder reaches them.", rows, ("measure",), folded=True)


def _split(text: str) -> Estimate | str:
    """Part a number from its interval."""
    return Estimate(*text.split(" ", 1)) if " [" in text else text


def _listed(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names) or "nothing"


def learned_lesson(measured: Mapping[str, Learned] | None) -> Lesson:
    """Say in one sentence in what the autoencoder is ahead of an untrained one."""
    if not measured:
        text = "Whether it has learned more than an untrained one is not measured here: there are no masks."
        return Lesson(text, "has-it-learned", 3)
    first = next(iter(measured.values()))
    leads = {
        "the purity of references": first.any_purity.ahead,
        "pointing at the object": first.pointing.ahead,
        "pointing where there are several": first.pointing_several.ahead,
        "the average precision of masks": first.precision.ahead,
    }  # fmt: skip
    ahead = [name for name, found in leads.items() if found.low > 0]
    not_ahead = [name for name in leads if name not in ahead]
    text = f"Against an untrained autoencoder of the same L0 training is clearly ahead in {_listed(ahead)}"
    text += f", and not in {_listed(not_ahead)}." if not_ahead else "."
    return Lesson(text, "has-it-learned", 3)


def search_table() -> Table | None:
    """Return the recipes among which chapter 1's was chosen; None where the search is not kept."""
    path = project_root() / "artefacts" / "sae" / "search.csv"
    if not path.is_file():
        return None
    frame = pd.read_csv(path).fillna("")
    frame.columns = [str(name).replace("_", " ") for name in frame.columns]
    rows = {str(at + 1): row for at, row in enumerate(frame.to_dict("records"))}
    return Table("Recipes that were tried.", rows, ("",), folded=True)
