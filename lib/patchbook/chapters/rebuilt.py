"""Chapter 1: what the autoencoder rebuilds, and what is left of accuracy and contrastive loss."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from patchbook.chapters.opening import Run
from patchbook.chapters.published import PAPERS_SAE, TABLE_2
from patchbook.lessons import Lesson
from patchbook.tables import Table, estimate, fixed, plain
from patchsae.clip.backbone import zero_shot_weights
from patchsae.images.sets import ImageSet
from patchsae.masking.through import (
    ContrastiveLoss,
    Reconstruction,
    ZeroShot,
    contrastive_loss,
    reconstruction,
    recovered,
    through_sae,
    zero_shot,
    zeroed,
)
from patchsae.runs.intervals import Interval, bootstrap

PAPER = {"original": 68.25, "through": 64.82}
"""Top-1 on ImageNet, in % (§4.1.2)."""
ROW = TABLE_2["all tokens"]
LABELS = {
    "d_in": "width of the residual stream", "expansion": "expansion", "d_sae": "latents", "lambda": "λ",
    "mse": "MSE / ‖z‖", "fvu": "FVU", "cosine": "cosine", "l0": "L0 (active latents per token)",
    "l1_norm": "L1 (sum of latents per token)", "dead_share": "share of latents silent on this set",
    "tokens": "tokens scored",
}  # fmt: skip


class Rebuilt(NamedTuple):
    """What the autoencoder rebuilds of test images."""

    run: Run
    images: ImageSet
    measured: Reconstruction


def rebuild(run: Run, test_images: int) -> Rebuilt:
    """Measure reconstruction on images that neither backbone nor autoencoder was trained on."""
    images = run.sets.test.sample(test_images, run.seed)
    found = run.keep(
        "rebuilt", Reconstruction, lambda: reconstruction(run.sae, run.backbone, images), [images]
    )
    return Rebuilt(run, images, found)


def rebuilt_table(found: Rebuilt) -> Table:
    """Return sizes, error and sparsity beside the paper's row of Table 2."""
    sae = found.run.sae
    size = {
        "d_in": sae.d_in, "expansion": sae.config.expansion, "d_sae": sae.d_sae, "lambda": sae.config.l1,
    }  # fmt: skip
    ours = size | found.measured._asdict()
    paper = {
        "d_in": PAPERS_SAE.d_in, "expansion": PAPERS_SAE.expansion, "d_sae": PAPERS_SAE.d_sae,
        "lambda": PAPERS_SAE.l1, "mse": ROW.mse, "l0": ROW.l0, "l1_norm": ROW.l1_norm,
    }  # fmt: skip
    rows = {
        title: {"this run": _in_print(ours[key]), "paper (Table 2)": _in_print(paper.get(key))}
        for key, title in LABELS.items()
    }
    return Table("Reconstruction on test images.", rows, ("",))


def _in_print(value: float | None) -> str:
    """Write small numbers in full: 0.00008 and not a power of ten."""
    if value is None or value == 0 or abs(value) >= 0.01:
        return plain(value)
    return np.format_float_positional(value, precision=3, fractional=False, trim="-")


def rebuilt_lesson(found: Rebuilt) -> Lesson:
    """Say in one sentence from how few latents a token is rebuilt, and how well."""
    m, sae = found.measured, found.run.sae
    text = (
        f"A token is rebuilt from {m.l0:.0f} of {sae.d_sae:,} latents, and {100 * m.fvu:.1f} % of the "
        f"variance "
        f"of tokens is not explained; the paper's autoencoder uses {ROW.l0:.0f} of {PAPERS_SAE.d_sae:,}."
    )
    return Lesson(text, "reconstruction", 2)


class Scored(NamedTuple):
    """Zero-shot accuracy in % on one data set, in three ways."""

    title: str
    classes: int
    images: int
    original: Interval
    through: Interval
    zero: Interval
    entropy: np.ndarray
    """Cross-entropy of the true class in the three ways."""

    @property
    def kept(self) -> float:
        """Return accuracy through the SAE, in % of the original's."""
        return 100 * self.through.value / max(self.original.value, 1e-9)


def score_benchmarks(run: Run, test_images: int, benchmark_images: int) -> list[Scored]:
    """Classify with the stream as it is, rebuilt, and set to zero; the trunk runs once per image."""
    edits, found = (None, through_sae(run.sae, run.backbone), zeroed(run.backbone)), []
    for number, benchmark in enumerate(run.sets.benchmarks):
        test = benchmark.test.sample(test_images if number == 0 else benchmark_images, run.seed)
        scored = run.keep(
            f"zero-shot-{benchmark.name}", ZeroShot,
            lambda: zero_shot(run.backbone, test, run.text(benchmark), edits),  # noqa: B023  (called at once)
            [test], prompts=run.setup.prompts(benchmark),
        )  # fmt: skip
        rows = [bootstrap(100 * row, run.seed) for row in scored.predictions == test.labels]
        found.append(
            Scored(
                benchmark.title, len(benchmark.classnames), len(test), *rows, scored.cross_entropy.mean(1)
            )
        )
    return found


def kept_table(scored: list[Scored]) -> Table:
    """Return what is left of accuracy on every data set."""
    rows = {}
    for one in scored:
        room = one.original.value > one.zero.value
        share = recovered(one.original.value, one.through.value, one.zero.value) if room else np.nan
        entropy = recovered(*one.entropy) if one.entropy[0] < one.entropy[2] else np.nan
        rows[one.title] = {
            "classes": one.classes, "images": one.images, "chance %": fixed(100 / one.classes, 1),
            "original %": estimate(one.original, 1), "through SAE %": estimate(one.through, 1),
            "zeroed %": fixed(one.zero.value, 1), "kept %": fixed(one.kept, 1),
            "recovered": fixed(share, 2), "CE recovered": fixed(entropy, 2),
        }  # fmt: skip
    return Table("Zero-shot accuracy with the stream rebuilt.", rows, ("data set",))


def kept_lesson(scored: list[Scored]) -> Lesson:
    """Say in one sentence what is kept on the general data set, beside the paper's."""
    one = scored[0]
    paper = 100 * PAPER["through"] / PAPER["original"]
    text = (
        f"**{one.title}**: {one.original.value:.1f} % with the model's own stream, "
        f"{one.through.value:.1f} % "
        f"through the SAE, so {one.kept:.1f} % of the accuracy is kept (paper, ImageNet: 68.25 and "
        f"64.82 %, so "
        f"{paper:.1f} %)."
    )
    return Lesson(text, "kept", 1)


def why_kept(scored: list[Scored], found: Rebuilt) -> str:
    """Say why the kept share is another than the paper's."""
    ours, paper = scored[0].kept, 100 * PAPER["through"] / PAPER["original"]
    if abs(ours - paper) < 1:
        return "**Why it differs.** It hardly does: the kept shares are less than a point apart."
    side = "More" if ours > paper else "Less"
    both = (found.measured.l0, found.run.sae.d_in), (ROW.l0, PAPERS_SAE.d_in)
    rate, theirs = (100 * l0 / width for l0, width in both)
    return (
        f"**Why it differs.** {side} is kept here than in the paper. A token is rebuilt from {rate:.0f} "
        f"active latents "
        f"per 100 dimensions (paper: {theirs:.0f}), and the {scored[0].classes:,} classes are others "
        f"than ImageNet's "
        "1,000: how near two classes are decides what an error costs."
    )


def contrast(found: Rebuilt) -> ContrastiveLoss:
    """Measure the contrastive loss with the CLS token rebuilt."""
    run, batch = found.run, min(1024, len(found.images))
    return run.keep(
        "contrast", ContrastiveLoss,
        lambda: contrastive_loss(run.sae, run.backbone, found.images, batch, seed=run.seed),
        [found.images], batch=batch,
    )  # fmt: skip


def contrast_table(loss: ContrastiveLoss) -> Table:
    """Return the loss on batches drawn at random and of one image per class, beside the paper's."""
    drawn, distinct = loss
    columns = {
        f"this run, {found.images:,} images {how}": {
            "original": _spread(found.original),
            "CLS reconstructed by the SAE": _spread(found.sae),
            "CLS set to zero": _spread(found.zeroed),
            "score": _spread(found.score),
        }
        for found, how in ((drawn, "at random"), (distinct, "of one class each"))
    }
    columns["paper (Table 2, B/16, all tokens)"] = {
        "original": fixed(ROW.cl_original, 3),
        "CLS reconstructed by the SAE": fixed(ROW.cl_sae, 3),
    }
    lines = next(iter(columns.values()))
    rows = {line: {name: column.get(line, "") for name, column in columns.items()} for line in lines}
    return Table("Contrastive loss in nat, mean ± standard deviation over batches.", rows, ("",))


def _spread(found) -> str:
    return f"{fixed(found.mean, 3)} ± {fixed(found.sd, 3)}"


def why_contrast(loss: ContrastiveLoss) -> str:
    """Say what reconstruction does to the loss, here and in the paper, and why that may differ."""
    ours, alone = (found.sae.mean - found.original.mean for found in loss)
    paper = ROW.cl_sae - ROW.cl_original
    said = (
        f"SAE − original: {fixed(ours, 3, sign=True)} nat here, {fixed(alone, 3, sign=True)} without "
        f"repeated "
        f"captions (paper: {fixed(paper, 3, sign=True)})."
    )
    if ours < 0:
        return f"{said} As in the paper, reconstruction *lowers* the loss."
    return (
        f"{said} **Why it differs.** In the paper reconstruction *lowers* the loss, here it raises it. "
        f"The loss asks "
        "for captions, and what moves it is how the model was trained on them: CLIP on captions of "
        "photographs, which "
        "name few of these classes in such words, a small CLIP on captions of the very kind that it is "
        "scored on. "
        "There an error can only cost. Batches have other sizes, too."
    )


def general_text(run: Run) -> torch.Tensor:
    """Return the text vectors of the test images' classes."""
    prompts = run.setup.prompts(run.sets.benchmarks[0])
    return zero_shot_weights(run.backbone, run.sets.test.classnames, prompts)
