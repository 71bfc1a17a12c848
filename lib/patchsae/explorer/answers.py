"""What models answer to a picture, as they are and with latents switched off or turned up.

A change takes (1 - gain) · f_s W_dec[s] away from the tokens where latent s is active, on CLS and all
patches or on one patch; the autoencoder's error stays, so that no change is the model's own answer to the
last bit (mode `add_error`: paper, footnote 4).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from patchsae.adaptation.adapted import Adapted
from patchsae.clip.backbone import Backbone, zero_shot_logits, zero_shot_weights
from patchsae.clip.tail import Tail
from patchsae.explorer.data import BATCH
from patchsae.images.sets import ImageSet
from patchsae.runs.errors import PatchSAEError
from patchsae.sae.model import SAE
from patchsae.training.activations import Tokens, token_columns

TEMPLATE = "a photo of a {}."
FIRST = 3  # classes that are shown of an answer


class Pictures(NamedTuple):
    """Pictures to choose from, and the classes that a model is asked to choose from for each of them."""

    title: str
    images: ImageSet
    templates: tuple[str, ...] = (TEMPLATE,)
    classes: tuple[str, ...] = ()
    """Names to answer with, where they are not those of the set's labels: no label is shown then."""

    @property
    def names(self) -> tuple[str, ...]:
        """Return the classes that are asked for."""
        return self.classes or self.images.classnames

    def label(self, index: int) -> int:
        """Return the true class of one image, -1 where it has none."""
        return -1 if self.classes else int(self.images.labels[index])


class Change(NamedTuple):
    """What is done to the latents of a picture."""

    gains: Mapping[int, float] = {}
    """Factor of a latent's activation: 0 switches it off."""
    rest: float = 1.0
    """Factor of all latents that are not named; 0 leaves the named alone."""
    patch: int | None = None
    """The only patch that is changed; None changes CLS and every patch."""


class Answers(NamedTuple):
    """The first classes of a picture under E changes, and the true one's share."""

    klass: np.ndarray  # int64 [E, FIRST], most likely first
    share: np.ndarray  # float32 [E, FIRST], probabilities
    true: np.ndarray  # float32 [E], of the true class; NaN where there is none


class Answerer:
    """Answer for one model, with the latents of one autoencoder."""

    def __init__(self, sae: SAE, backbone: Backbone):
        self.sae, self.backbone, self.tail = sae, backbone, Tail(backbone)
        self.columns = torch.from_numpy(token_columns(backbone, Tokens.ALL)).to(backbone.device)

    @torch.no_grad()
    def changed(self, x: Tensor, changes: Sequence[Change]) -> Tensor:
        """Return tokens [1, T, d] under each change: [E, T, d].

        Raises PatchSAEError for a latent or a patch that there is not, and a gain that is no number.
        """
        tokens = x[0, self.columns].float()
        f, (_, _, scale) = self.sae.encode(tokens), self.sae.normalise(tokens)
        out = x.repeat(len(changes), 1, 1)
        for row, change in zip(out, changes, strict=True):
            rows = self._rows(change)
            latents = torch.tensor(sorted(change.gains), dtype=torch.long, device=x.device)
            self._check(change)
            gain = torch.tensor([float(change.gains[int(s)]) for s in latents], device=x.device)
            if change.rest == 1:  # few latents: the others are not touched
                delta = (f[rows][:, latents] * (gain - 1)) @ self.sae.W_dec[latents]
            else:
                factor = torch.full((f.shape[1],), float(change.rest), device=x.device)
                factor[latents] = gain
                delta = (f[rows] * (factor - 1)) @ self.sae.W_dec
            delta = delta * (scale[rows] if isinstance(scale, Tensor) else scale)
            row[self.columns[rows]] += delta.to(row.dtype)
        return out

    def _rows(self, change: Change) -> Tensor:
        rows = torch.arange(len(self.columns), device=self.columns.device)
        if change.patch is None:
            return rows
        patches = np.flatnonzero(self.backbone.token_kind[self.columns.cpu().numpy()] == "patch")
        if not 0 <= change.patch < len(patches):
            raise PatchSAEError(f"patch {change.patch} is none of the {len(patches)}.")
        return rows[int(patches[change.patch])][None]

    def _check(self, change: Change) -> None:
        count = self.sae.d_sae
        if wrong := [s for s in change.gains if not 0 <= s < count]:
            raise PatchSAEError(f"latent {wrong[0]} is none of the {count}.")
        if not np.isfinite([*change.gains.values(), change.rest]).all():
            raise PatchSAEError("a latent is turned by what is no number.")

    @torch.no_grad()
    def __call__(self, x: Tensor, text: Tensor, changes: Sequence[Change], label: int = -1) -> Answers:
        """Classify tokens [1, T, d] of one picture under each change; text [C, e] is a vector per class."""
        found = [
            zero_shot_logits(self.backbone, self.tail(self.changed(x, changes[i : i + BATCH])), text)
            for i in range(0, len(changes), BATCH)
        ]
        shares = torch.cat(found).double().softmax(-1).float().cpu()
        best = shares.topk(min(FIRST, shares.shape[1]), dim=-1)
        true = shares[:, label].numpy() if label >= 0 else np.full(len(shares), np.nan, np.float32)
        return Answers(best.indices.numpy(), best.values.numpy(), true)


def class_vectors(backbone: Backbone, names: Sequence[str], templates: Sequence[str]) -> Tensor:
    """Return one text vector per class, [C, e], with the words that an adapted model has learned."""
    if isinstance(backbone, Adapted):
        return backbone.class_weights(names)
    return zero_shot_weights(backbone, names, templates)


@torch.no_grad()
def predictions(backbone: Backbone, images: ImageSet, text: Tensor) -> np.ndarray:
    """Return the most likely class of each image: int64 [N]."""
    tail = Tail(backbone)
    found = [
        zero_shot_logits(backbone, tail(backbone.residual(backbone.normalize(batch.images))), text).argmax(
            -1
        )
        for batch in images.batches(BATCH)
    ]
    return torch.cat(found).cpu().numpy() if found else np.zeros(0, np.int64)


def telling(
    pictures: Pictures, clip: Backbone, adapted: Backbone, count: int, first: int, seed: int = 0
) -> Pictures:
    """Choose pictures by rule: drawn at random, but `first` of them ones that only the adapted model gets.

    Those are the first that it gets right and CLIP does not, in the set's order. Where there are fewer,
    more are drawn. `count` is how many there are in all.
    """
    images, names = pictures.images, pictures.names
    asked = [(model, class_vectors(model, names, pictures.templates)) for model in (clip, adapted)]
    only: list[int] = []
    for start in range(0, len(images), BATCH):
        if len(only) >= first:
            break  # nobody asks what follows
        rows = np.arange(start, min(start + BATCH, len(images)))
        part = images.subset(rows)
        clip_says, adapted_says = (predictions(model, part, text) for model, text in asked)
        only += rows[(adapted_says == part.labels) & (clip_says != part.labels)].tolist()
    only = only[:first]
    drawn = np.random.default_rng(seed).permutation(np.setdiff1d(np.arange(len(images)), only))
    return pictures._replace(images=images.subset([*only, *np.sort(drawn[: count - len(only)])]))
