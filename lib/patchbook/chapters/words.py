"""Chapter 3, Fig. 13: latents that fire on a written word and on pictures of the thing."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from patchbook.chapters.localization import Described
from patchbook.chapters.opening import Run, pictures
from patchbook.chapters.reading import Cards, Multimodal, auroc, multimodal, word_cards
from patchbook.chapters.verdicts_of_latents import p_of, reads_and_sees
from patchbook.figures import Shown
from patchbook.lessons import Lesson, lesson
from patchbook.report import Finding, finding
from patchbook.tables import Table, estimate, fixed, percent
from patchsae.clip.backbone import zero_shot_logits, zero_shot_weights
from patchsae.images.sets import ImageSet
from patchsae.latents.best_latents import alternate
from patchsae.latents.maps import fired, image_means, masked_images
from patchsae.runs.intervals import Interval, bootstrap

PROMPTS = ('a picture with the word "{}"', "a picture of a {}")
LEVEL = 0.9
"""AUROC from which on a latent tells a word, or a thing, from the others."""
HEADINGS = ("card", "mask", "picture", "mask")


class Told(NamedTuple):
    """How well each latent tells words and things, and what the model makes of the cards."""

    words: np.ndarray
    """AUROC, the lower one of both halves of the images: float64 [C, S]."""
    things: np.ndarray
    """The same of pictures."""
    read: np.ndarray
    """Embeddings of the cards [N, e]."""


@dataclass(frozen=True)
class Words:
    """Written words and the things that they name, and how well each latent tells them apart."""

    run: Run
    texts: list[str]
    names: list[str]
    """Class names of the same concepts."""
    cards: Cards
    things: ImageSet
    told: Told

    @cached_property
    def pairs(self) -> Multimodal:
        """Return the pairs of latent and concept that are told in writing and in pictures."""
        return multimodal(self.told.words, self.told.things, level=LEVEL, seed=self.run.seed)

    @cached_property
    def right(self) -> dict[str, np.ndarray]:
        """Tell which cards the model reads rightly, by prompt."""
        found = {}
        for prompt in PROMPTS:
            with warnings.catch_warnings():  # of words that are one to the model: that is what is measured
                warnings.simplefilter("ignore", UserWarning)
                text = zero_shot_weights(self.run.backbone, self.names, prompt)
            read = torch.from_numpy(self.told.read).to(text.device)
            said = zero_shot_logits(self.run.backbone, read, text).argmax(-1).cpu().numpy()
            found[prompt] = said == self.cards.labels
        return found

    @property
    def reading(self) -> Interval:
        """Return the accuracy of reading by the better prompt."""
        found = (bootstrap(hit, self.run.seed) for hit in self.right.values())
        return max(found, key=lambda accuracy: accuracy.value)

    def __str__(self) -> str:
        n, null = len(self.pairs.latent), self.pairs.null
        verdict = (
            "more than chance explains: some latents read and see"
            if p_of(n, null) < 0.05
            else "no more than chance explains: **this run shows no latent that reads and sees**"
        )
        return f"{n} pairs, {null.mean():.1f} expected if words and things were unrelated: {verdict}."


def open_words(run: Run, words: int, per_word: int) -> Words:
    """Show concepts with short names as cards and as pictures, and ask every latent about both."""
    general = run.sets.benchmarks[0].test
    named = [c for c, n in enumerate(general.classnames) if n.isalpha() and 3 <= len(n) <= 6]
    spaced = np.linspace(0, len(named) - 1, min(words, len(named))).round().astype(int)
    named = [named[i] for i in np.unique(spaced)]
    texts = [general.classnames[c].upper() for c in named]
    cards = word_cards(texts, per_word, run.backbone.image_size, run.seed)
    things = general.classes(named)
    things = things.subset(
        np.concatenate([np.flatnonzero(things.labels == c)[:per_word] for c in range(len(named))])
    )
    told = run.keep("words", Told, lambda: _tell(run, cards, things), [things], texts=texts, per=per_word)
    return Words(run, texts, [general.classnames[c] for c in named], cards, things, told)


def _tell(run: Run, cards: Cards, things: ImageSet) -> Told:
    on_cards, read = activations(run, cards.images.split(32))
    on_things, _ = activations(run, (batch.images for batch in things.batches(32)))
    told = []
    for found, labels in ((on_cards, cards.labels), (on_things, things.labels)):
        half = alternate(labels)
        told.append(np.minimum(*(auroc(found[part], labels[part]) for part in (half, ~half))))
    return Told(*told, read.cpu().numpy())


@torch.no_grad()
def activations(run: Run, batches: Iterable[Tensor]) -> tuple[np.ndarray, Tensor]:
    """Return image-level activations [N, S] over patches, and the embeddings [N, e]."""
    means, embedded, patches = [], [], run.patches
    for batch in batches:
        x = run.backbone.residual(run.backbone.normalize(batch))
        embedded.append(run.backbone.finish(x))
        means.append(image_means(fired(run.sae, x[:, patches]), len(x), len(patches), run.sae.d_sae))
    return np.concatenate(means), torch.cat(embedded)


def word_table(found: Words) -> Table:
    """Return how many words and things are told, and how many pairs chance alone would give."""
    n, null = len(found.pairs.latent), found.pairs.null
    values = {
        "concepts": len(found.texts),
        **{
            f"zero-shot on cards, %, '{prompt}'": percent(bootstrap(hit, found.run.seed))
            for prompt, hit in found.right.items()
        },
        "zero-shot, chance, %": fixed(100 / len(found.texts), 1),
        "words told from others by some latent": int((found.told.words >= LEVEL).any(1).sum()),
        "things told from others by some latent": int((found.told.things >= LEVEL).any(1).sum()),
        "pairs of latent and concept: both": n,
        "the same, words dealt at random: mean": fixed(float(null.mean()), 2),
        "the same, words dealt at random: 97.5 % quantile": fixed(float(np.quantile(null, 0.975)), 1),
        "p": fixed(p_of(n, null), 4),
    }
    rows = {name: {"value": value} for name, value in values.items()}
    return Table("Words read and things seen.", rows, ("",), folded=True)


def clearest(found: Words, described: Described, n: int = 6) -> list[Shown]:
    """Return the pairs with the highest smallest AUROC, each latent and concept once."""
    rows: list[Shown] = []
    used: set[str] = set()
    best = multimodal(found.told.words, found.told.things, level=0.5, draws=0)
    for latent, concept, word, thing in zip(*best[:4], strict=True):
        text = found.texts[concept]
        if {f"latent {latent}", text} & used or not described.usual[latent] or len(rows) == n:
            continue
        used |= {f"latent {latent}", text}
        card = found.cards.images[np.flatnonzero(found.cards.labels == concept)[:1]]
        picture = found.things.load(np.flatnonzero(found.things.labels == concept)[:1]).images
        masks = [
            masked_images(found.run.sae, found.run.backbone, image, latent)[0] for image in (card, picture)
        ]
        every = [pictures(card)[0], masks[0], pictures(picture)[0], masks[1]]
        title = f"latent {latent}, {text}: AUROC, word {word:.2f}, thing {thing:.2f}"
        rows.append(Shown(title, every, *described.references(latent)))
    return rows


def fig_13(found: Words) -> Finding:
    """Judge Fig. 13."""
    told = reads_and_sees(len(found.pairs.latent), found.pairs.null, found.reading, len(found.texts))
    return finding(
        "Fig. 13",
        claim="Some latents are active for a written word and for pictures of the thing.",
        quantity="pairs of latent and concept told apart by word and by thing, minus chance",
        unit="pairs",
        rule="there are more pairs than when words are dealt to things at random (p < 0.05)",
        **told.told(),
        effect_name="standard deviations of the number that chance gives",
    )


def fig_13_lesson(found: Words, judged: Finding) -> Lesson:
    """Say in one sentence whether latents read and see."""
    n, expected = len(found.pairs.latent), fixed(float(found.pairs.null.mean()), 1)
    reads = estimate(found.reading, 0, 100)
    return lesson(
        judged, 3,
        holds=f"Some latents read a word and see its thing: {n} pairs, where chance gives {expected}.",
        fails=f"The model reads {reads} % of the words, but no latent reads and sees: {n} pairs, where "
        f"chance gives {expected}.",
        open_=f"This small model hardly reads ({reads} % of the words), so whether latents read and see "
        "cannot be told here.",
    )  # fmt: skip
