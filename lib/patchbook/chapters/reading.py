"""Latents that fire on a written word and on the thing that it names (Fig. 13)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from patchbook.scenes.pictograms import uniforms
from patchbook.scenes.sprites import photos, words
from patchsae.runs.errors import PatchSAEError
from patchsae.runs.intervals import group_auroc


class Cards(NamedTuple):
    """Images that show a written word and nothing that it names."""

    images: Tensor  # [N, 3, H, W] uint8
    masks: np.ndarray  # [N, H, W] bool, where the plate with the word is
    labels: np.ndarray  # [N] int64, which text


def word_cards(texts: Sequence[str], per_text: int, size: int, seed: int = 0) -> Cards:
    """Write each text in black on a white plate, on a flat colour or a test photo.

    Place, size (55 to 90 % of the side) and background follow from (seed, card) alone.
    """
    if not texts or per_text < 1:
        raise PatchSAEError("word cards need at least one text and per_text of at least 1.")
    plates, grounds = words(list(texts)), photos("test")
    labels = np.tile(np.arange(len(texts)), per_text)
    u = uniforms(f"cards/{seed}", np.arange(len(labels)), 8)
    images = np.empty((len(labels), size, size, 3), np.uint8)
    masks = np.zeros(images.shape[:3], bool)
    for card, (label, draw) in enumerate(zip(labels, u, strict=True)):
        if draw[6] < 0.5:
            ground = Image.fromarray(np.asarray(grounds[int(draw[3] * len(grounds))]))
            canvas = np.asarray(ground.resize((size, size)), np.float32).copy()
        else:
            canvas = np.full((size, size, 3), 255 * draw[3:6], np.float32)
        side = round(size * (0.55 + 0.35 * draw[0]))
        plate = Image.fromarray(np.asarray(plates[label])).resize((side, side), Image.Resampling.BILINEAR)
        rgba = np.asarray(plate, np.float32)
        y, x = ((size - side) * draw[1:3]).astype(int)
        alpha, place = rgba[..., 3:] / 255, np.s_[y : y + side, x : x + side]
        canvas[place] = canvas[place] * (1 - alpha) + rgba[..., :3]
        masks[card][place] = alpha[..., 0] >= 0.5
        images[card] = canvas.round().clip(0, 255)
    return Cards(torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), masks, labels)


def auroc(activation: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Compute how well each latent tells each class from all others: [N, S], [N] to float64 [C, S].

    The probability that an image of the class activates the latent more than one of another class, ties
    counted half; 0.5 for a silent latent.
    """
    count = np.bincount(labels)
    if len(count) < 2 or not count.all():
        raise PatchSAEError("telling classes apart takes at least two, each with an image.")
    return group_auroc(activation, labels[:, None] == np.arange(len(count)))


class Multimodal(NamedTuple):
    """Latents that tell a concept from others both in writing and in pictures, the clearest first."""

    latent: np.ndarray  # [n] int64
    concept: np.ndarray  # [n] int64
    written: np.ndarray  # [n] AUROC of the word among words
    seen: np.ndarray  # [n] AUROC of the thing among things
    null: np.ndarray  # [draws] how many there are when words are dealt to things at random


def multimodal(
    written: np.ndarray, seen: np.ndarray, level: float = 0.9, draws: int = 1000, seed: int = 0
) -> Multimodal:
    """Find pairs of latent and concept with both AUROC [C, S] at `level` or above.

    The null deals words to things at random: it keeps how many words and how many things every latent tells
    from the others, and breaks only that they belong together.
    """
    words_told, things_told = written >= level, seen >= level
    concept, latent = np.nonzero(words_told & things_told)
    least = np.minimum(written, seen)[concept, latent]
    order = np.lexsort((latent, -least))
    rng = np.random.default_rng(seed)
    null = [(words_told[rng.permutation(len(written))] & things_told).sum() for _ in range(draws)]
    concept, latent = concept[order], latent[order]
    return Multimodal(
        latent, concept, written[concept, latent], seen[concept, latent], np.array(null, np.int64)
    )
