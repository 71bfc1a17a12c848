"""Chapter 1: the backbone, the book's autoencoder and a short one beside it, and ghost gradients."""

from __future__ import annotations

import csv
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from patchbook.chapters.opening import MEMORY, Run
from patchbook.figures import OneImage
from patchbook.lessons import Lesson
from patchbook.report import Finding, finding
from patchbook.shipped import load_shipped
from patchbook.tables import Table, fixed, percent
from patchsae.clip.backbone import zero_shot_logits
from patchsae.latents.maps import masked_images
from patchsae.masking.through import ZeroShot, text_digest, through_sae, zero_shot
from patchsae.runs.intervals import Interval, bootstrap
from patchsae.training.trainer import Trained

KINDS = {
    "trained": "seen in training",
    "untrained": "seen in other styles",
    "novel": "novel concept (among novel ones)",
}
DEAD = 0.2  # share of dead latents from which on there is something to remedy
HARSHEST = 4
TOKENS = 197  # of the paper's images


class Card(NamedTuple):
    """What was written down when the small CLIP was trained."""

    about: dict[str, object]
    curve: list[dict[str, float]]

    @property
    def styles(self) -> list[str]:
        """Return the drawing styles that its accuracy was measured in."""
        return list(self.about["accuracy"])

    @property
    def chance(self) -> float:
        """Return the accuracy of guessing among the trained concepts."""
        return next(iter(self.about["accuracy"].values()))["trained"]["chance"]

    def __str__(self) -> str:
        return (
            f"{self.about['parameters'] / 1e6:.2f} million parameters, {self.about['images_seen']:,} "
            f"images "
            f"seen, seed {self.about['seed']}, {self.about['concepts']['trained']} trained concepts"
        )

    def table(self) -> Table:
        """Return its zero-shot accuracy by style and by what training showed."""
        rows = {
            (style, KINDS[kind]): {
                "top-1 %": fixed(100 * row["concept"], 1),
                "chance %": fixed(100 * row["chance"], 1),
                "subgroup %": fixed(100 * row["subgroup"], 1),
                "majority %": fixed(100 * row["majority"], 1),
                "images": row["n"],
            }
            for style, kinds in self.about["accuracy"].items()
            for kind, row in kinds.items()
        }
        caption = "Zero-shot accuracy of the small CLIP, loaded from its card."
        return Table(caption, rows, ("style", "pairs"), folded=True)


def read_card(folder: str | Path) -> Card | None:
    """Read the card and the learning curve of a backbone of this project; None where there is none."""
    folder = Path(folder)
    if not (folder / "card.json").is_file():
        return None
    curve: list[dict[str, float]] = []
    if (folder / "curve.csv").is_file():
        with open(folder / "curve.csv", newline="") as file:
            curve = [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]
    return Card(json.loads((folder / "card.json").read_text()), curve)


class Pair(NamedTuple):
    """The book's autoencoder, and the one that is trained when the page is made."""

    book: Trained
    live: Trained
    started: str

    @property
    def curves(self) -> dict[str, Sequence]:
        """Return what was written down while they were trained."""
        name = "the book's (loaded)" if self.book.shipped else "the book's"
        return {name: self.book.metrics, "live": self.live.metrics}

    def __str__(self) -> str:
        lines = []
        for name, run in (("the book's SAE", self.book), ("the live one", self.live)):
            size, seen = run.sae.W_dec.shape, int(run.metrics[-1]["tokens"])
            lines.append(
                f"{name}: {size[0]:,} latents on {size[1]} dimensions, {seen:,} tokens seen, "
                f"{_origin(run, self.started)}"
            )
        return "\n".join(lines)


def _origin(run: Trained, started: str) -> str:
    """Say where an SAE comes from and what it took."""
    if run.shipped:
        seconds = load_shipped(run.shipped).card["seconds"]
        return f"loaded from artefacts/sae/{run.shipped}; 'make saes' took {seconds:,.0f} s for it"
    made = json.loads((run.folder / "manifest.json").read_text())
    found = ", found in results" if made["started"] < started else ""
    return f"trained in {made['seconds']:,.0f} s on {made['started'][:10]}{found}"


def train_pair(run: Run, live_images: int) -> Pair:
    """Open the book's autoencoder and train a short one by its recipe."""
    started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    # the same few images again and again: their tokens, not the steps, would cost the time
    few = run.sets.train.sample(max(live_images // 4, 1), run.seed)
    shorter = {"images": live_images, "seed": run.seed, "cache": str(run.root)}
    book = run.trained
    live = run.setup.trained_sae(
        few, run.backbone, run.root / "live", run.changes.sae, shorter, progress=False
    )
    return Pair(book, live, started)


class Overview(NamedTuple):
    """Fig. 1: the method on one image, and how often the answer stays."""

    shown: OneImage
    steps: tuple[str, str, str]
    names: tuple[str, str]
    """First class of the model, and through the autoencoder."""
    kept: Interval
    """How often both are the same, over test images, in %."""
    images: int
    classes: int
    tokens: int
    patches: int
    backbone: str
    pictures: str = "test images"
    """What the images are called."""

    def __str__(self) -> str:
        own, through = self.names
        here = (
            f"Through the SAE the model's first class stays “{own}” for this image."
            if own == through
            else f"For this image the model's first class changes, from “{own}” to “{through}”."
        )
        kept = percent([v / 100 for v in self.kept])
        return (
            f"{here} Over {self.images:,} {self.pictures} of {self.classes:,} classes, it is the same for "
            f"{kept} %."
        )


@torch.no_grad()
def overview(run: Run, text: Tensor, test_images: int) -> Overview:
    """Follow the first test image through the model, and count over test images whether answers stay."""
    backbone, sae, test, block = run.backbone, run.sae, run.sets.test, run.backbone.block
    backbone.remember(MEMORY)  # `rebuild` and `contrast` ask of the same test images
    one, patches = test.load([0]), run.patches
    stream = backbone.residual(backbone.normalize(one.images)).float()
    latents = sae.encode(stream)
    rebuilt = sae.decode(latents)
    answers = {
        name: zero_shot_logits(backbone, backbone.finish(x), text).softmax(-1)[0].cpu().numpy()
        for name, x in (("model", stream), ("through SAE", rebuilt))
    }
    on_patches = latents[0, patches].cpu().numpy()
    special = (on_patches > 0).mean(0) <= 0.5
    order = np.argsort(-on_patches.sum(0) * special, kind="stable")
    five = np.argsort(-answers["model"], kind="stable")[:5]
    shown = OneImage(
        one.images[0].permute(1, 2, 0).numpy(), backbone.grid, stream[0].cpu().numpy(),
        latents[0].cpu().numpy()[:, order[:60]], rebuilt[0].cpu().numpy(),
        {f"latent {s}": masked_images(sae, backbone, one.images, int(s))[0] for s in order[:3]},
        {name: values[five] for name, values in answers.items()}, [test.classnames[c] for c in five],
    )  # fmt: skip
    counted = test.sample(test_images, run.seed)
    own, through = run.keep(
        "first-classes", ZeroShot,
        lambda: zero_shot(backbone, counted, text, (None, through_sae(sae, backbone))),
        [counted], text=text_digest(text),
    ).predictions  # fmt: skip
    kept = bootstrap(100.0 * (own == through), run.seed)
    names = tuple(test.classnames[values.argmax()] for values in answers.values())
    steps = (f"blocks 1–{block}", "encoder", "decoder")
    # where several things compete to be the label, small errors turn more answers than they cost accuracy
    pictures = "test scenes, many of several objects," if run.has_masks else "test images"
    return Overview(
        shown, steps, names, kept, len(counted), len(text), stream.shape[1], len(patches), backbone.name,
        pictures,
    )  # fmt: skip


def fig_1(found: Overview) -> Finding:
    """Say of Fig. 1 that all tokens are rebuilt, which is so by construction."""
    whole = found.tokens == 1 + found.patches == TOKENS
    return finding(
        "Fig. 1",
        can_fail=False,
        claim="The autoencoder is trained on all tokens of an image, the CLS token and every patch.",
        quantity="tokens of an image that are rebuilt",
        paper=TOKENS,
        ours=found.tokens,
        rule="the residual stream has 197 tokens, CLS and patches, and all go through the autoencoder",
        verdict=whole,
        why="" if found.tokens == TOKENS else f"{found.backbone} cuts images into {found.patches} patches.",
        reason="data lacking",
    )


class Ghost(NamedTuple):
    """Short runs in which latents die, with and without ghost gradients."""

    runs: dict[str, Sequence[Mapping[str, float]]]
    harsher: int
    """The step size was doubled, and λ taken times four, so many times."""
    most: float
    """The largest share of dead latents in the run of the book's own SAE."""

    def end(self, name: str) -> dict[str, float]:
        """Average the end of a run."""
        last = self.runs[name][-10:]
        return {key: float(np.mean([row[key] for row in last])) for key in ("dead_share", "fvu", "l0")}

    @property
    def dies(self) -> bool:
        """Tell whether latents die without the remedy."""
        return self.end("without")["dead_share"] >= DEAD

    def __str__(self) -> str:
        return (
            f"dead latents in the run of the book's own SAE: at most {self.most:.2%}\n"
            f"harsher here: step size × {2**self.harsher}, λ × {4**self.harsher}"
        )


def ghost_runs(run: Run, images: int, l1: float | None) -> Ghost:
    """Train short runs under ever harsher settings until a fifth of the latents die, then the remedy.

    `l1`: weight of the penalty where the harshness begins; None takes the scale's.
    """
    few = run.sets.train.sample(max(images // 4, 1), run.seed)
    weight = run.setup.l1 if l1 is None else l1

    def short(harsher: int, remedy: bool) -> Sequence[Mapping[str, float]]:
        settings = {
            "images": images, "seed": run.seed, "lr": 2**harsher * run.setup.train.lr, "log_every": 10,
            "token_batch": min(512, run.setup.train.token_batch), "warmup_steps": 20, "decay_from": 1.0,
            "l1_warmup": 0.0, "cache": str(run.root),
        }  # fmt: skip
        objective = run.changes.sae | {"l1": 4**harsher * weight, "ghost": remedy}
        return run.setup.trained_sae(
            few, run.backbone, run.root / "ghost", objective, settings, progress=False
        ).metrics

    most = max((row["dead_share"] for row in run.trained.metrics), default=0.0)  # of one given: none
    for harsher in range(1, HARSHEST + 1):
        found = Ghost({"with ghost gradients": [], "without": short(harsher, False)}, harsher, most)
        if found.dies:
            break
    return found._replace(runs=found.runs | {"with ghost gradients": short(harsher, True)})


def ghost_table(found: Ghost) -> Table:
    """Return what the runs end with."""
    rows = {}
    for name in found.runs:
        end = found.end(name)
        rows[name] = {
            "dead latents %": fixed(100 * end["dead_share"], 1),
            "FVU": fixed(end["fvu"], 3),
            "L0": fixed(end["l0"], 1),
        }
    return Table("The last ten logged steps of either run.", rows, ("run",))


def ghost_lesson(found: Ghost) -> Lesson:
    """Say in one sentence what the remedy does, where latents really die."""
    with_, without = found.end("with ghost gradients"), found.end("without")
    dead = [f"{end['dead_share']:.1%}" for end in (with_, without)]
    if not found.dies:
        effect = (
            "Latents hardly die here even under the harshest setting, so ghost gradients have little to do"
        )
    elif round(100 * (without["dead_share"] - with_["dead_share"]), 1) > 0:
        effect = "Where latents die, ghost gradients keep them alive"
    else:
        effect = "Where latents die, ghost gradients do not keep them alive"
    gap = round(with_["fvu"] - without["fvu"], 3)
    change = "worse" if gap > 0 else "better" if gap < 0 else "the same"
    text = (
        f"{effect}: {dead[0]} are dead over the last steps with them, {dead[1]} without. Reconstruction is "
        f"{change} with "
        f"them: FVU {with_['fvu']:.3f} and {without['fvu']:.3f}"
        + (", no better than the mean token under settings so harsh." if with_["fvu"] >= 1 else ".")
    )
    return Lesson(text.replace("%", " %"), "ghost", 3)
