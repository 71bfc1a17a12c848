"""Sums, counts and top lists over the images seen so far, from lists of active latents alone.

Accumulators merge: that of A ∪ B is merge(A, B), exactly for counts and top lists and to float64 rounding
for sums. Nothing has an image, a token and a latent axis.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch

from patchsae.runs.errors import PatchSAEError
from patchsae.runs.tensors import load_tensors, save_tensors
from patchsae.runs.threads import ranges, spread
from patchsae.sae.cpu import Lists
from patchsae.sae.cpu_kernels import kernel

# log10 of a token's activation: below the first edge, between edges, above the last
EDGES = np.linspace(-3, 2, 21)
ROWS = 512  # latents per range
ADDED = (
    *("active_images", "tau_images", "active_tokens", "token_sum"),
    *("histogram", "class_count", "class_sum", "class_images"),
)
TOP = ("top_value", "top_index", "top_label", "top_count")
PER_IMAGE = ("seen", "image_latent", "image_value")


class Accumulator:
    """Statistics of latents over images.

    Arrays (S latents, C classes, K kinds of token, N images of the set, k references, m top latents):
    active_images, tau_images int64 [S]; active_tokens int64 and token_sum float64 [K, S]; histogram int64
    [S, bins]; class_count int32 [K, S, C]; class_sum float64 [S, C]; class_images int64 [C]; top_* [S, k];
    seen bool [N], image_latent int32 and image_value float32 [N, m].

    Parameters
    ----------
    kind : int8 [T], the kind (0 … K-1) of each token of an image
    tau : threshold τ of Eq. 4
    """

    def __init__(
        self, latents: int, classes: int, images: int, kind: np.ndarray, tau: float, k: int, m: int
    ):
        kinds = int(kind.max()) + 1
        self.kind, self.tau = kind.astype(np.int8), np.float32(tau)
        self.active_images, self.tau_images = (np.zeros(latents, np.int64) for _ in range(2))
        self.active_tokens = np.zeros((kinds, latents), np.int64)
        self.token_sum = np.zeros((kinds, latents))
        self.histogram = np.zeros((latents, len(EDGES) + 1), np.int64)
        self.class_count = np.zeros((kinds, latents, classes), np.int32)
        self.class_sum = np.zeros((latents, classes))
        self.class_images = np.zeros(classes, np.int64)
        self.top_value = np.zeros((latents, k), np.float32)
        self.top_index, self.top_label = (np.full((latents, k), -1, np.int64) for _ in range(2))
        self.top_count = np.zeros((latents, k), np.int32)
        self.seen = np.zeros(images, bool)
        self.image_latent = np.full((images, m), -1, np.int32)
        self.image_value = np.zeros((images, m), np.float32)

    @property
    def images(self) -> int:
        return int(self.seen.sum())

    def update(self, lists: Lists, labels: np.ndarray, indices: np.ndarray) -> None:
        """Add images from latent-major lists over their tokens, image by image.

        lists.index counts tokens 0 … B·T-1; labels, indices int64 [B] are the images' class and number.
        """
        labels, indices = labels.astype(np.int64), indices.astype(np.int64)
        parts = ranges(len(self.active_images), ROWS)
        m = self.image_latent.shape[1]
        latent = np.full((len(parts), len(labels), m), -1, np.int32)
        value = np.zeros(latent.shape, np.float32)
        fields = [getattr(self, name) for name in (*ADDED[:-1], *TOP)]
        args = (*lists, self.kind, self.tau, labels, indices, *fields)
        spread(lambda a, b: accumulate(*args, latent[a // ROWS], value[a // ROWS], a, b), parts)
        # ranges ascend, so a stable sort by value leaves ties to the lower latent
        latent, value = (v.transpose(1, 0, 2).reshape(len(labels), len(parts) * m) for v in (latent, value))
        best = np.argsort(-value, axis=1, kind="stable")[:, :m]
        self.image_latent[indices] = np.take_along_axis(latent, best, 1)
        self.image_value[indices] = np.take_along_axis(value, best, 1)
        self.class_images += np.bincount(labels, minlength=len(self.class_images))
        self.seen[indices] = True

    def merge(self, other: Accumulator) -> Accumulator:
        """Add what another accumulator saw of the same set; return self.

        Raises
        ------
        PatchSAEError : both saw one image.
        """
        if (twice := np.flatnonzero(self.seen & other.seen)).size:
            raise PatchSAEError(
                f"image {twice[0]} (and {twice.size - 1} more) is in both parts; merge disjoint ones."
            )
        for name in ADDED:
            getattr(self, name).__iadd__(getattr(other, name))
        both = {name: np.concatenate([getattr(self, name), getattr(other, name)], axis=1) for name in TOP}
        # an empty place has value 0 and comes last; ties go to the lower image
        best = np.lexsort((both["top_index"], -both["top_value"]), axis=1)[:, : self.top_value.shape[1]]
        for name in TOP:
            setattr(self, name, np.take_along_axis(both[name], best, 1))
        for name in PER_IMAGE:
            getattr(self, name)[other.seen] = getattr(other, name)[other.seen]
        return self

    def save(self, path: Path, **facts: object) -> None:
        """Write everything to one safetensors file, atomically, with JSON-able facts."""
        arrays = {name: torch.from_numpy(getattr(self, name)) for name in (*ADDED, *TOP, *PER_IMAGE)}
        save_tensors(path, arrays, facts)

    def load(self, path: Path) -> dict[str, object]:
        """Take over what `save` wrote for an accumulator of this shape, and return the facts.

        Raises
        ------
        PatchSAEError : the file is damaged or of another shape.
        """
        try:
            arrays, facts = load_tensors(path)
            for name in (*ADDED, *TOP, *PER_IMAGE):
                np.copyto(getattr(self, name), arrays[name].numpy(), casting="no")
        except (KeyError, TypeError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise PatchSAEError(
                f"'{path}' holds no part of this atlas ({reason}); delete it to start over."
            ) from error
        return facts


@kernel
def accumulate(
    start, token, value, kind, tau, labels, indices, active_images, tau_images, active_tokens, token_sum,
    histogram, class_count, class_sum, top_value, top_index, top_label, top_count, best_latent, best_value,
    a, b,
):  # fmt: skip
    """Add a batch for latents a … b-1; write each image's top latents among these to best_*."""
    per_image = len(kind)
    for i in range(a, b):
        e = start[i]
        while e < start[i + 1]:
            image = token[e] // per_image
            first = image * per_image
            label = labels[image]
            total, over = 0.0, 0
            while e < start[i + 1] and token[e] < first + per_image:
                v, k = value[e], kind[token[e] - first]
                total += v
                active_tokens[k, i] += 1
                token_sum[k, i] += v
                place = math.ceil((math.log10(v) - EDGES[0]) / STEP)
                histogram[i, min(max(place, 0), BINS)] += 1
                if v > tau:
                    over += 1
                    class_count[k, i, label] += 1
                e += 1
            mean = np.float32(total / per_image)
            active_images[i] += 1
            tau_images[i] += over > 0
            class_sum[i, label] += total / per_image
            insert_reference(
                top_value[i], top_index[i], top_label[i], top_count[i], mean, indices[image], label, over
            )
            insert_latent(best_latent[image], best_value[image], i, mean)


STEP, BINS = EDGES[1] - EDGES[0], len(EDGES)


@kernel
def insert_reference(value, index, label, count, v, image, klass, over):
    """Keep the largest values in order, ties to the lower image; places without an image have index -1."""
    last = len(value) - 1
    if index[last] >= 0 and (v < value[last] or (v == value[last] and image > index[last])):
        return
    place = last
    while place > 0 and (
        index[place - 1] < 0 or v > value[place - 1] or (v == value[place - 1] and image < index[place - 1])
    ):
        value[place], index[place] = value[place - 1], index[place - 1]
        label[place], count[place] = label[place - 1], count[place - 1]
        place -= 1
    value[place], index[place], label[place], count[place] = v, image, klass, over


@kernel
def insert_latent(latent, value, i, v):
    """Keep the largest values in order; latents come in ascending order, so ties stay with the lower."""
    place = len(value) - 1
    if latent[place] >= 0 and v <= value[place]:
        return
    while place > 0 and (latent[place - 1] < 0 or v > value[place - 1]):
        value[place], latent[place] = value[place - 1], latent[place - 1]
        place -= 1
    value[place], latent[place] = v, i
