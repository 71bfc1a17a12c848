"""The best latent of each class by a mask score, chosen and reported on different images, with controls."""

from __future__ import annotations

from enum import StrEnum

import numpy as np
import torch
from torch import Tensor

from patchsae.latents.scores import METRICS, Metric, Scores
from patchsae.runs.errors import PatchSAEError
from patchsae.sae.model import SAE, Activation


class Row(StrEnum):
    """What is scored: the claim first, then what it has to beat."""

    BEST = "best latent of the class"
    ONE = "one latent for all classes"
    """The single latent with the best mean over all classes: knows objects, not which."""
    OTHER = "latent of another class"
    """Expectation over the latents chosen for the other classes."""
    RANDOM = "random latent active on the class"
    """Expectation over all latents that fire on any image of the class it was chosen from."""
    UNTRAINED = "random SAE: best latent of the class"
    """Chosen like the first, from an SAE that was never trained."""
    UNTRAINED_OTHER = "random SAE: latent of another class"
    LENGTH = "length of the token"
    """The distance of each patch's token from the mean token: no direction, no latent."""
    CHANCE = "area of the object"
    """A map that ignores the image."""


def alternate(*keys: np.ndarray) -> np.ndarray:
    """Mark the first, third, … image of each combination of keys [N]: bool [N], two halves alike."""
    order = np.lexsort(keys)  # stable: images of one combination keep their order
    sorted_keys = np.stack(keys)[:, order]
    new = np.append(True, (sorted_keys[:, 1:] != sorted_keys[:, :-1]).any(0))
    first = np.flatnonzero(new)
    rank = np.arange(len(order)) - np.repeat(first, np.diff(np.append(first, len(order))))
    marked = np.empty(len(order), bool)
    marked[order] = rank % 2 == 0
    return marked


def choose(scores: Scores, metric: Metric, on: np.ndarray, classes: np.ndarray | None = None) -> np.ndarray:
    """Choose each class's latent by its mean score over the images `on`, bool [N].

    `classes` [N] replaces the labels. Returns int64 [C], ties to the lower latent, -1 for a class in which
    none scores above 0.
    """
    classes = scores.labels if classes is None else classes
    here = on[scores.image]
    image, latent = scores.image[here], scores.latent[here]
    pairs, where = np.unique(classes[image] * scores.latents + latent, return_inverse=True)
    # all latents of a class are averaged over the same images, so their sums rank them
    total = np.bincount(where, scores.value[METRICS.index(metric)][here].astype(np.float64))
    klass, latent = np.divmod(pairs, scores.latents)
    best = np.lexsort((latent, -total, klass))
    best = best[np.unique(klass[best], return_index=True)[1]]
    chosen = np.full(int(classes.max()) + 1, -1)
    chosen[klass[best]] = np.where(total[best] > 0, latent[best], -1)
    return chosen


def score_of(scores: Scores, metric: Metric, latent: np.ndarray) -> np.ndarray:
    """Look up the score of one latent per image, [N], 0 where it is silent or -1: float64 [N]."""
    value = scores.value[METRICS.index(metric)]
    if not len(value):
        return np.zeros(len(latent))
    rows = scores.image * scores.latents + scores.latent
    wanted = np.arange(len(latent)) * scores.latents + latent
    place = np.searchsorted(rows, wanted).clip(max=len(rows) - 1)
    return np.where((rows[place] == wanted) & (latent >= 0), value[place], 0).astype(np.float64)


def compare(
    trained: Scores, untrained: Scores, length: Scores, metric: Metric, on: np.ndarray, report: np.ndarray
) -> dict[Row, np.ndarray]:
    """Score the best latent of each class and its controls, image by image.

    Parameters
    ----------
    trained, untrained, length : scores of both SAEs and of `token_length` on the same images
    on : bool [N], images that latents are chosen on
    report : bool [N], images that are reported, none of them in `on`

    Returns
    -------
    float64 [images reported] for each row

    Raises
    ------
    PatchSAEError : an image is in both parts, or either has none.
    """
    if (on & report).any() or not on.any() or not report.any():
        raise PatchSAEError("latents must be chosen on some images and reported on others; split them.")
    labels, image = trained.labels, trained.image
    value = trained.value[METRICS.index(metric)].astype(np.float64)
    chosen = choose(trained, metric, on)
    one = choose(trained, metric, on, np.zeros_like(labels))[0]
    by_chance = choose(untrained, metric, on)
    pair = labels[image] * trained.latents + trained.latent
    active = np.unique(pair[on[image]])
    allowed = np.bincount(image, value * np.isin(pair, active), len(labels))
    count = np.bincount(active // trained.latents, minlength=len(chosen))
    rows = {
        Row.BEST: score_of(trained, metric, chosen[labels]),
        Row.ONE: score_of(trained, metric, np.full_like(labels, one)),
        Row.OTHER: _others(trained, metric, chosen),
        Row.RANDOM: allowed / np.maximum(count[labels], 1),
        Row.UNTRAINED: score_of(untrained, metric, by_chance[labels]),
        Row.UNTRAINED_OTHER: _others(untrained, metric, by_chance),
        Row.LENGTH: score_of(length, metric, np.zeros_like(labels)),
        Row.CHANCE: trained.chance[METRICS.index(metric)].astype(np.float64),
    }
    return {name: values[report] for name, values in rows.items()}


def _others(scores: Scores, metric: Metric, chosen: np.ndarray) -> np.ndarray:
    """Average, for each image, the scores of the latents chosen [C] for all classes but its own: [N]."""
    often = np.bincount(chosen[chosen >= 0], minlength=scores.latents)
    value = scores.value[METRICS.index(metric)].astype(np.float64)
    total = np.bincount(scores.image, value * often[scores.latent], len(scores.labels))
    return (total - score_of(scores, metric, chosen[scores.labels])) / max(len(chosen) - 1, 1)


@torch.no_grad()
def random_sae(sae: SAE, x: Tensor, seed: int = 0) -> SAE:
    """Return an untrained SAE of the same shape whose sparsity and scale on tokens x [N, d_in] are alike.

    Its directions are those training would start from; b_dec is the mean token, one number added to all of
    b_enc makes as many latents active as in the trained SAE (TopK has them anyway), and one factor makes
    active latents as strong on average, so that τ means the same.

    Raises
    ------
    PatchSAEError : the SAE is silent on these tokens.
    """
    control = SAE(sae.config, seed).to(x.device)
    control.b_dec.copy_(x.mean(0))
    f = sae.encode(x)
    active = int((f > 0).sum())
    if not active:
        raise PatchSAEError("the SAE is silent on these tokens; take more of them.")
    if sae.config.activation is not Activation.TOPK:
        z = control.pre_activations(x).flatten()
        control.b_enc -= z.kthvalue(len(z) - active).values if active < len(z) else z.min()
    g = control.encode(x)
    scale = f[f > 0].mean() / g[g > 0].mean()
    control.W_enc *= scale
    control.b_enc *= scale
    return control
