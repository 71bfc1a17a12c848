"""Names of latents from a vocabulary, each with what speaks for it on pictures whose content is known.

A name is chosen without any label: by what the latent's decoder direction does to the embedding, and by
what its reference images look like, both compared with texts. Then it is judged: how well the latent's
activation tells the pictures that show what the word says from the others, beside the same of other words.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from patchsae.clip.backbone import Backbone
from patchsae.clip.tail import Tail
from patchsae.explorer.answers import TEMPLATE
from patchsae.explorer.data import BATCH
from patchsae.images.sets import ImageSet
from patchsae.latents.maps import patch_tokens
from patchsae.runs.errors import PatchSAEError
from patchsae.runs.intervals import group_auroc
from patchsae.runs.progress import progress_bar
from patchsae.sae.model import SAE

LEAST = 6  # pictures that must show a word, and as many not, before it is judged
PROOF = 0.9  # AUROC from which on a name counts as proven (patchbook's known truth has the same)
OTHERS = 0.95  # share of the other words that a proven name must beat
CHUNK = 64  # latents whose directions are sent through the last blocks at a time


class Vocabulary(NamedTuple):
    """Words that latents may be called by, and pictures of which it is known what each shows."""

    words: tuple[str, ...]
    texts: tuple[str, ...]
    """What the text tower reads for each word."""
    images: ImageSet
    """Pictures that no latent was named by."""
    shows: np.ndarray
    """Which words are true of each picture: bool [N, V]."""


class Names(NamedTuple):
    """The name of each of S latents, and what speaks for it."""

    word: np.ndarray  # int64 [S], place in the vocabulary, -1 where there is nothing to name by
    auroc: np.ndarray  # float32 [S], of the name, NaN where it cannot be judged
    others: np.ndarray  # float32 [S], below it lies the share OTHERS of the other words' AUROCs
    proven: np.ndarray  # bool [S]


def labels_as_words(images: ImageSet, template: str = TEMPLATE) -> Vocabulary:
    """Take a set's class names as the vocabulary, and its labels as what is known of its pictures."""
    names = tuple(name.replace("_", " ") for name in images.classnames)
    texts = tuple(template.replace("{}", name) for name in names)
    return Vocabulary(names, texts, images, images.labels[:, None] == np.arange(len(names)))


def name_latents(
    sae: SAE, clip: Backbone, looks: np.ndarray, living: np.ndarray, vocabulary: Vocabulary,
    tokens: Tensor, progress: bool = True,
) -> Names:  # fmt: skip
    """Name the latents and judge the names.

    Parameters
    ----------
    looks : mean unit embedding of each latent's reference images [S, e], NaN where it has none
    living : bool [S], latents that are named
    tokens : mean residual stream [1, T, d], to which the directions are added

    Raises
    ------
    PatchSAEError : the vocabulary has fewer than two words, or `shows` is of another shape.
    """
    words, images, shows = vocabulary.words, vocabulary.images, vocabulary.shows
    if len(words) < 2 or len(vocabulary.texts) != len(words) or shows.shape != (len(images), len(words)):
        raise PatchSAEError(
            f"the vocabulary has {len(words)} words, {len(vocabulary.texts)} texts and knows "
            f"{list(shows.shape)} of {len(images)} images: give two or more, with a text and a column each."
        )
    text = torch.cat([clip.encode_text(vocabulary.texts[i : i + 256]) for i in range(0, len(words), 256)])
    text = F.normalize((text - text.mean(0)).float(), dim=-1).cpu().numpy()
    named = living & np.isfinite(looks).all(1)
    word, auroc = np.full(len(living), -1), np.full(len(living), np.nan, np.float32)
    others, s = auroc.copy(), np.flatnonzero(named)
    if len(s):
        seen = _agreement(looks[s], text)
        done = _agreement(_effects(sae, clip, s, tokens), text)
        word[s] = (seen + done).argmax(1)
        asked = (shows.sum(0) >= LEAST) & ((~shows).sum(0) >= LEAST)
        if asked.any():
            scores = np.full((len(words), len(s)), np.nan)
            fires = strongest_patches(sae, clip, images, s, progress)
            scores[asked] = group_auroc(fires, shows[:, asked])
            own = scores[word[s], np.arange(len(s))]
            scores[word[s], np.arange(len(s))] = np.nan  # what is left is the other words'
            auroc[s], others[s] = own, np.nanquantile(scores, OTHERS, axis=0) if asked.sum() > 1 else np.nan
    with np.errstate(invalid="ignore"):
        return Names(word, auroc, others, (auroc >= PROOF) & (auroc > others))


def _agreement(vectors: np.ndarray, text: np.ndarray) -> np.ndarray:
    """Compare vectors [S, e] with texts [V, e], in standard deviations over latents: [S, V]."""
    centred = vectors - vectors.mean(0)
    length = np.linalg.norm(centred, axis=1, keepdims=True)
    cosine = centred / np.maximum(length, 1e-12) @ text.T
    # a word that is near to everything is no name for anything
    return (cosine - cosine.mean(0)) / np.maximum(cosine.std(0), 1e-12)


@torch.no_grad()
def _effects(sae: SAE, clip: Backbone, latents: np.ndarray, tokens: Tensor) -> np.ndarray:
    """Return how each latent's direction moves the embedding of the mean picture: float32 [latents, e]."""
    tail, moved = Tail(clip), []
    length = tokens.float().norm(dim=-1, keepdim=True)
    at_rest = F.normalize(tail(tokens).float(), dim=-1)
    for part in np.split(latents, range(CHUNK, len(latents), CHUNK)):
        rows = F.normalize(sae.W_dec[torch.from_numpy(part).to(tokens.device)], dim=-1)[:, None]
        pushed = tail((tokens + 0.5 * length * rows).to(tokens.dtype))
        moved.append((F.normalize(pushed.float(), dim=-1) - at_rest).cpu().numpy())
    return np.concatenate(moved)


@torch.no_grad()
def strongest_patches(
    sae: SAE, clip: Backbone, images: ImageSet, latents: np.ndarray, progress: bool = True
) -> np.ndarray:
    """Return the highest activation of some latents over each image's patches: float32 [N, latents]."""
    chosen, found = torch.from_numpy(latents).to(clip.device), []
    steps = range(0, len(images), BATCH)
    for first in progress_bar(steps, desc="pictures of known content", shown=progress):
        batch = images.load(range(first, min(first + BATCH, len(images))))
        x = patch_tokens(clip, batch.images)
        highest = [sae.encode(one.float()).amax(0)[chosen] for one in x]
        found.append(torch.stack(highest).cpu().numpy())
    return np.concatenate(found)
