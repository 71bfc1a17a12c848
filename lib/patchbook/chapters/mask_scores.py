"""Chapter 3: do masks match the objects, against hard controls, and are they coherent without masks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from scipy.sparse import csr_array
from torch import Tensor

from patchbook.chapters.opening import Run
from patchbook.chapters.verdicts_of_latents import Found, points_better
from patchbook.lessons import Lesson, lesson
from patchbook.report import Finding
from patchbook.scenes.embedded import domain_sets
from patchbook.tables import Table, estimate, fixed, percent
from patchsae.latents.best_latents import Row, alternate, choose, compare, random_sae
from patchsae.latents.scores import METRICS, Metric, Pass, Scores, score_latents, token_length
from patchsae.latents.spatial import monosemanticity
from patchsae.runs.intervals import Interval, bootstrap

TITLES = {
    Metric.IOU: "IoU at τ", Metric.BEST_IOU: "IoU, best threshold", Metric.POINTING: "pointing game",
    Metric.PRECISION: "AP",
}  # fmt: skip
SEEN, SEVERAL, UNSEEN = "trained styles", "… two or more objects", "silhouette"
FIT_IMAGES = 32  # training images whose tokens the random SAE is set by
DRAWS = 1000


@dataclass(frozen=True)
class MaskScores:
    """Scores of every latent, trained and random, on scenes with masks; and who is chosen for a class."""

    run: Run
    domains: Mapping[str, object]
    """Scenes of the same classes, by style."""
    sample: Tensor
    """Training tokens [N, d]."""
    maps: Mapping[str, object]
    scored: Mapping[str, Scores]
    embeddings: Mapping[str, np.ndarray]

    @property
    def table(self) -> Scores:
        """Return the scores of the trained SAE."""
        return self.scored["trained"]

    @cached_property
    def unseen(self) -> np.ndarray:
        """Tell which scenes are of the style that nothing was trained on: bool [N]."""
        return self.table.group == list(self.domains).index(UNSEEN)

    @cached_property
    def on(self) -> np.ndarray:
        """Tell which scenes choose: bool [N]."""
        return alternate(self.table.labels, self.table.group) & ~self.unseen

    @cached_property
    def report(self) -> np.ndarray:
        """Tell which scenes report: bool [N]."""
        return ~alternate(self.table.labels, self.table.group) | self.unseen

    @property
    def held(self) -> np.ndarray:
        """Return the numbers of the reported scenes in trained styles."""
        return np.flatnonzero(self.report & ~self.unseen)

    @cached_property
    def values(self) -> dict[Metric, dict[Row, np.ndarray]]:
        """Return each score of the best latent and of every control, on the reported scenes."""
        return {m: compare(*self.scored.values(), m, self.on, self.report) for m in METRICS}

    @cached_property
    def groups(self) -> dict[str, np.ndarray]:
        """Return which reported scenes belong to a group: bool [reported]."""
        seen = ~self.unseen[self.report]
        several = seen & (self.table.objects[self.report] > 1)
        group = self.table.group[self.report]
        return {SEEN: seen, SEVERAL: several} | {n: group == i for i, n in enumerate(self.domains)}

    @cached_property
    def intervals(self) -> dict[Metric, dict[str, dict[Row, Interval]]]:
        """Return mean scores by group and row."""
        return {
            m: {
                group: {row: bootstrap(v[here], self.run.seed, DRAWS) for row, v in rows.items()}
                for group, here in self.groups.items()
            }
            for m, rows in self.values.items()
        }

    @cached_property
    def gaps(self) -> dict[tuple[str, Metric], dict[Row, Interval]]:
        """Return by how much the best latent is ahead of each control, in the same scenes."""
        found = {}
        for group in (SEEN, SEVERAL, UNSEEN):
            here = self.groups[group]
            for m, rows in self.values.items():
                best = rows[Row.BEST][here]
                found[group, m] = {
                    row: bootstrap(best - v[here], self.run.seed, DRAWS)
                    for row, v in rows.items()
                    if row != Row.BEST
                }
        return found

    def activations(self, name: str = "trained") -> csr_array:
        """Return image-level activations [N, S] of an SAE."""
        part = self.scored[name]
        shape = (len(part.labels), part.latents)
        return csr_array((part.activation, (part.image, part.latent)), shape)

    def pointing(self) -> Found:
        """Judge the pointing game in trained styles."""
        rows = {row: v[self.groups[SEEN]] for row, v in self.values[Metric.POINTING].items()}
        return points_better(rows[Row.BEST], rows[Row.UNTRAINED], rows[Row.CHANCE], self.run.seed)

    def __str__(self) -> str:
        return (
            f"{len(self.table.labels):,} scenes of {len(np.unique(self.table.labels))} classes scored, "
            f"{self.on.sum():,} to choose on and {self.report.sum():,} to report; {self.table.left_out} "
            "left out because the object covers no patch by half"
        )


def score_masks(run: Run, classes: int, class_images: int, tau: float) -> MaskScores | None:
    """Score the masks of all latents, trained and random, in each style; None without object masks."""
    if not run.has_masks:
        return None
    backbone = run.backbone
    sets = domain_sets("test", classes, class_images, backbone.device)
    images = run.sets.train.sample(FIT_IMAGES, run.seed).load(range(FIT_IMAGES)).images
    with torch.no_grad():
        sample = backbone.residual(backbone.normalize(images)).flatten(0, 1).float()
    maps = {
        "trained": run.sae,
        "random": random_sae(run.sae, sample, run.seed),
        "length": token_length(sample.mean(0)),
    }

    def own(images: Tensor, tokens: Tensor) -> Tensor:
        return backbone.finish(tokens)

    encoders = {"own embedding": own, "4×4 colours": mean_colours}
    scored, embeddings = run.keep(
        "mask-scores", Pass, lambda: score_latents(maps, backbone, sets, tau, encoders=encoders),
        sets.values(), tau=tau,
    )  # fmt: skip
    return MaskScores(run, sets, sample, maps, scored, embeddings)


def mean_colours(images: Tensor, tokens: Tensor) -> Tensor:
    """Embed images without any network: 4×4 mean colours."""
    return F.adaptive_avg_pool2d(images.float() / 255, 4).flatten(1)


def score_table(scores: MaskScores) -> Table:
    """Return every score of the best latent and of the controls."""
    rows: dict[tuple, dict] = {}
    for m, groups in scores.intervals.items():
        for group, cells in groups.items():
            for row, found in cells.items():
                rows.setdefault((group, str(row)), {})[TITLES[m]] = estimate(found)
    caption = "Mean scores over scenes, best latent and controls."
    return Table(caption, rows, ("scenes", "what is scored"), folded=True)


def gap_table(scores: MaskScores) -> Table:
    """Return by how much the best latent is ahead of each control."""
    rows: dict[tuple, dict] = {}
    for (group, m), cells in scores.gaps.items():
        for row, found in cells.items():
            rows.setdefault((group, str(row)), {})[TITLES[m]] = estimate(found)
    caption = "By how much the best latent of a class is ahead of each control, in the same scenes."
    return Table(caption, rows, ("scenes", "ahead of"), folded=True)


def answers(scores: MaskScores) -> dict[str, str]:
    """Answer what a mask is about, each question by the control that asks it."""
    sae = scores.run.sae
    directions = f"; the best of {sae.d_sae:,} directions in {sae.config.d_in} dimensions"
    return {
        "Does the best latent know where the object is?": _answer(scores, SEEN, Row.CHANCE),
        "Is it about the class where the object is not alone?": _answer(scores, SEVERAL, Row.ONE),
        "Did training find it?": _answer(scores, SEEN, Row.UNTRAINED) + directions,
        "Does it say more than the length of tokens?": _answer(scores, SEEN, Row.LENGTH),
        "Is it about the class in a style that nothing was trained on?": _answer(scores, UNSEEN, Row.OTHER),
    }


def _answer(scores: MaskScores, group: str, row: Row) -> str:
    gaps = [scores.gaps[group, m][row] for m in METRICS]
    better, worse = sum(gap.low > 0 for gap in gaps), sum(gap.high < 0 for gap in gaps)
    word = "yes" if better == len(gaps) else "by some scores" if better else "not clearly by any score"
    return f"**{word}**: ahead of “{row}” by {better} of {len(gaps)} scores, behind by {worse} ({group})"


def pointing_lines(scores: MaskScores) -> list[str]:
    """Say how the pointing game ends in each group, and what depends on the length of tokens."""
    lines, seed = [], scores.run.seed
    for group in (SEEN, SEVERAL, UNSEEN):
        rows = scores.intervals[Metric.POINTING][group]
        gaps = scores.gaps[group, Metric.POINTING]
        behind = [row for row, gap in gaps.items() if gap.high < 0]
        level = [row for row, gap in gaps.items() if gap.low <= 0 <= gap.high]
        told = {"behind": behind, "not clearly ahead of": level}
        verdict = "; ".join(f"{word}: {', '.join(rows)}" for word, rows in told.items() if rows)
        verdict = verdict or "ahead of every control"
        best, area = (estimate(rows[row]) for row in (Row.BEST, Row.CHANCE))
        lines.append(f"Pointing, {group}: {best}, area {area}; {verdict}.")
    rows = {row: v[scores.groups[SEEN]] for row, v in scores.values[Metric.POINTING].items()}
    special, control = (
        rows[Row.BEST] - rows[Row.OTHER],
        rows[Row.UNTRAINED] - rows[Row.UNTRAINED_OTHER],
    )
    lost = [estimate(bootstrap(gap, seed)) for gap in (special, control, special - control)]
    lines.append(
        f"Lost with another class's latent (trained styles): {lost[0]} in the trained SAE, {lost[1]} in "
        f"the random one; difference {lost[2]}."
    )
    tied = length_correlation(scores)
    lines.append(
        f"Correlation of a token's active latents with its length: {fixed(tied[0], 2)} in the trained SAE, "
        f"{fixed(tied[1], 2)} in the random one."
    )
    chosen = choose(scores.table, Metric.POINTING, scores.on)
    return [*lines, f"The {len(chosen)} classes have {len(np.unique(chosen))} different best latents."]


@torch.no_grad()
def length_correlation(scores: MaskScores) -> list[float]:
    """Correlate how many latents are active on a token with its length, in both SAEs."""
    sample = scores.sample
    far = (sample - sample.mean(0)).norm(dim=1).cpu().numpy()
    found = []
    for name in ("trained", "random"):
        active = (scores.maps[name].encode(sample) > 0).sum(1).cpu().numpy()
        found.append(float(np.corrcoef(far, active)[0, 1]))
    return found


def pointing_lesson(scores: MaskScores | None, fig_2: Finding) -> Lesson:
    """Say in one sentence what the masks of class latents are worth."""
    if not scores:
        return Lesson("Masks cannot be scored here: these images have no object masks.", "mask-scores", 1)
    rows = scores.intervals[Metric.POINTING][SEEN]
    best, area = (percent(rows[row], 0) for row in (Row.BEST, Row.CHANCE))
    head = f"The best latent of a class points at its object in {best} % of the scenes (its area: {area})"
    return lesson(
        fig_2, 1,
        holds=f"{head}, {{}} more than the best latent of an untrained SAE.",
        fails=f"{head}, but that is no evidence that training found it: {{}} against an untrained SAE.",
        open_=f"{head}; whether training found it is not clear: {{}} against an untrained SAE.",
    )  # fmt: skip


def coherence_table(scores: MaskScores) -> Table:
    """Return Moran's I and monosemanticity of latents that are active on ten scenes, and chance."""
    seed, table = scores.run.seed, scores.table
    colours = scores.embeddings["4×4 colours"]
    spaces = {
        "own embedding": scores.embeddings["own embedding"],
        "4×4 colours": colours - colours.mean(0),
        "label": np.eye(table.labels.max() + 1)[table.labels],
    }
    columns, chance = {}, []
    for name in ("trained", "random"):
        part, active = scores.scored[name], scores.activations(name).astype(np.float64)
        often = np.bincount(part.latent, minlength=part.latents) >= 10
        clear = np.isfinite(part.moran)
        sums = np.bincount(part.latent[clear], part.moran[clear], part.latents)
        moran = sums / np.maximum(np.bincount(part.latent[clear], minlength=part.latents), 1)
        column = {"latents": f"{often.sum():,}", "Moran's I": estimate(bootstrap(moran[often], seed))}
        chance = []
        for space, vectors in spaces.items():
            mono = monosemanticity(active, vectors)
            column[f"monosemanticity, {space}"] = estimate(bootstrap(mono.score[often], seed))
            chance.append(mono.chance)
        columns[f"{name} SAE"] = column
    nothing = ["", fixed(-1 / (len(scores.run.patches) - 1), 3), *(fixed(c, 3) for c in chance)]
    columns["chance"] = dict(zip(column, nothing, strict=True))
    rows = {line: {name: column[line] for name, column in columns.items()} for line in column}
    return Table("Coherence of maps and of what latents are about.", rows, ("score",), folded=True)
