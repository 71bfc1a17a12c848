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


def pick_features(x: np.ndarray, there: np.ndarray, k: int, rising: bool = False) -> np.ndarray:
    """Return the k features of x [N, F] whose means differ most, in standard deviations: int64 [k].

    there: bool [N], which images have the concept. rising: only features that are larger where it is.
    Raises PatchSAEError where all or no images have it.
    """
    if there.all() or not there.any():
        raise PatchSAEError("a probe needs images with the concept and images without: take more images.")
    gap = x[there].mean(0) - x[~there].mean(0)
    spread = x.std(0)
    score = np.divide(gap, spread, out=np.zeros_like(gap, np.float64), where=spread > 0)
    return np.argsort(-(score if rising else np.abs(score)), kind="stable")[:k]


def probe_auroc(
    train: tuple[np.ndarray, np.ndarray], test: tuple[np.ndarray, np.ndarray], k: int | None = None
) -> float:
    """Return the area under the ROC curve, on test images, of a logistic probe.

    Parameters
    ----------
    train, test : features [N, F], and whether the concept is there, bool [N]
    k : on how many features, chosen on the training images by `pick_features`; None takes all

    Raises
    ------
    PatchSAEError : all or no images of either have the concept.
    """
    (x, there), (x_test, there_test) = train, test
    if there_test.all() or not there_test.any():
        raise PatchSAEError("a probe needs test images with the concept and images without: take more.")
    kept = np.arange(x.shape[1]) if k is None else pick_features(x, there, k)
    model = make_pipeline(StandardScaler(), LogisticRegression(class_weight="balanced", max_iter=1000))
    model.fit(x[:, kept], there)
    return float(roc_auc_score(there_test, model.decision_function(x_test[:, kept])))


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
