"""How well few latents tell a concept, and what else the concept goes through: sparse probes, absorption.

A sparse probe is a logistic regression on the k features that differ most between images with a concept
and without. With k = 1 and k = 5 it asks whether single latents are enough; with all dimensions of the
stream it says what could be told at all (SAEBench, ViSAEBench; facts.md §7).

A latent is absorbed where it should fire and something more special fires in its place (Chanin et al.,
2024, 2409.14507): the concept is there, its latent is silent, and one other latent makes most of what a
supervised direction of the concept sees.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from patchsae.runs.errors import PatchSAEError
from patchsae.sae.cpu import Lists

NEEDS = "a probe needs images with the concept and images without: take more images."


class Absorbed(NamedTuple):
    """What happens where a concept is seen, by token: bool [N] each."""

    missed: np.ndarray
    """The concept's latent is silent."""
    absorbed: np.ndarray
    """And one other latent makes at least half of what the supervised direction gets from latents."""


def image_maxima(lists: Lists, images: int, tokens: int) -> np.ndarray:
    """Return the largest activation of each latent in each image: float32 [images, S].

    lists: latent-major, of the tokens of one image after the other, so many in each.
    Raises PatchSAEError for a token beyond the last image.
    """
    if lists.index.max(initial=-1) >= images * tokens:
        raise PatchSAEError(
            f"{images} images have {images * tokens} tokens, and the lists name another one."
        )
    found = np.zeros((images, len(lists.start) - 1), np.float32)
    latent = np.repeat(np.arange(found.shape[1]), np.diff(lists.start))
    np.maximum.at(found, (lists.index // tokens, latent), lists.value)
    return found


def contrasts(x: np.ndarray, there: np.ndarray) -> np.ndarray:
    """Return how far the means of images with and without a concept lie apart: float64 [C, F].

    x: features [N, F]. there: bool [N, C], which images have each concept. In standard deviations of a
    feature; 0 for one that never changes. Raises PatchSAEError where all or no images have a concept.
    """
    if there.all(0).any() or not there.any(0).all():
        raise PatchSAEError(NEEDS)
    x, n = x.astype(np.float64), there.sum(0)[:, None]
    own, every = there.T.astype(np.float64) @ x, x.sum(0)  # one product for all concepts
    gap, spread = own / n - (every - own) / (len(x) - n), x.std(0)
    return np.divide(gap, spread, out=np.zeros_like(gap), where=spread > 0)


def pick_features(contrast: np.ndarray, k: int, rising: bool = False) -> np.ndarray:
    """Return the k features of the largest contrasts [F], the largest first: int64 [k].

    rising: only features that are larger where the concept is.
    """
    return np.argsort(-(contrast if rising else np.abs(contrast)), kind="stable")[:k]


def probe_auroc(train: tuple[np.ndarray, np.ndarray], test: tuple[np.ndarray, np.ndarray]) -> float:
    """Return the area under the ROC curve, on test images, of a logistic probe of a few features.

    train, test: features [N, F], and whether the concept is there, bool [N].
    Raises PatchSAEError where all or no images of either have the concept.
    """
    (x, there), (x_test, there_test) = train, test
    for marked in (there, there_test):
        if marked.all() or not marked.any():
            raise PatchSAEError(NEEDS)
    model = make_pipeline(StandardScaler(), LogisticRegression(class_weight="balanced", max_iter=1000))
    model.fit(x, there)
    return float(roc_auc_score(there_test, model.decision_function(x_test)))


def absorption(f: np.ndarray, gain: np.ndarray, latent: int) -> Absorbed:
    """Tell on which tokens of a concept its latent is missing, and absorbed.

    Parameters
    ----------
    f : activations [N, S] on tokens where the concept is seen
    gain : [S], cosine of each decoder row with the concept's supervised direction
    latent : the concept's own
    """
    part = f * np.maximum(gain, 0)  # what each latent adds in the direction
    total, largest = part.sum(1), part.max(1, initial=0)
    missed = f[:, latent] <= 0
    return Absorbed(missed, missed & (largest > 0) & (largest >= total / 2))
