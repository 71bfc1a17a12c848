"""How good is an SAE: reconstruction, sparsity, and what is left of the model's predictions and losses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from patchsae.clip.backbone import Backbone, zero_shot_logits
from patchsae.clip.tail import Tail
from patchsae.images.sets import ImageSet, short_hash
from patchsae.runs.checks import check_finite
from patchsae.runs.errors import PatchSAEError
from patchsae.runs.intervals import Interval, wilson
from patchsae.sae.model import SAE
from patchsae.training.activations import Tokens, token_columns

Edit = Callable[[Tensor], Tensor]  # residual-stream tokens [B, T, d] to [B, T, d]


class Reconstruction(NamedTuple):
    """Averages over all tokens of an image set (facts.md §7)."""

    mse: float
    """Mean of (x̂ - x)² / ‖x‖, the unit of Table 2."""
    fvu: float
    """Σ‖x - x̂‖² / Σ‖x - x̄‖²: 0 perfect, 1 no better than the mean."""
    cosine: float
    """Mean cosine of x and x̂."""
    l0: float
    """Mean number of active latents per token."""
    l1_norm: float
    """Mean sum of latents per token."""
    dead_share: float
    """Share of latents that fire on no token of the set."""
    tokens: int
    """Tokens seen."""


class ZeroShot(NamedTuple):
    """What a model says to the images of a set under each of E edits."""

    predictions: np.ndarray
    """Most likely class: int64 [E, N]."""
    cross_entropy: np.ndarray
    """-log p of the true class, the logit scale included: float64 [E, N]."""


class Spread(NamedTuple):
    """Mean and standard deviation over draws."""

    mean: float
    sd: float


class Contrast(NamedTuple):
    """The contrastive loss under three edits, in nat, over batches drawn in one way."""

    original: Spread
    sae: Spread
    """With the CLS token replaced by its reconstruction."""
    zeroed: Spread
    """With the CLS token set to zero."""
    score: Spread
    """(sae - original) / (zeroed - original): 0 perfect, 1 as bad as zeroing, negative possible."""
    images: int
    """Images in a batch."""


class ContrastiveLoss(NamedTuple):
    """Symmetric in-batch cross-entropy of images and texts (facts.md §4.4)."""

    drawn: Contrast
    """Batches of images drawn at random: captions come several times."""
    distinct: Contrast
    """Batches of one image of each class name: no caption comes twice."""


@torch.no_grad()
def reconstruction(
    sae: SAE, backbone: Backbone, images: ImageSet, tokens: Tokens = Tokens.ALL, batch_size: int = 32
) -> Reconstruction:
    """Measure an SAE on every token of an image set, in one pass and float64 sums.

    Raises
    ------
    PatchSAEError : the set is empty; what the SAE makes of a token is not finite.
    """
    if not len(images):
        raise PatchSAEError(f"'{images.name}' has no images to measure on; give others.")
    columns = torch.from_numpy(token_columns(backbone, tokens)).to(backbone.device)
    n, mse, cosine, l0, l1_norm, error = 0, 0.0, 0.0, 0.0, 0.0, 0.0
    total = torch.zeros(sae.d_in, dtype=torch.float64, device=backbone.device)
    square = 0.0
    fired = torch.zeros(sae.d_sae, dtype=torch.bool, device=backbone.device)
    for batch in images.batches(batch_size, progress="measuring the SAE"):
        x = backbone.residual(backbone.normalize(batch.images))[:, columns].flatten(0, 1).float()
        f = sae.encode(x)
        remedy = "check the weights of the SAE and of the model, and that the SAE is of this block"
        x_hat = check_finite("what the SAE rebuilds", sae.decode(f, x), remedy)
        gap = (x - x_hat).square()
        n += len(x)
        mse += (gap.mean(-1) / x.norm(dim=-1)).sum().item()
        cosine += torch.cosine_similarity(x, x_hat, dim=-1).sum().item()
        l0 += (f > 0).sum().item()
        l1_norm += f.sum(dtype=torch.float64).item()
        error += gap.sum(dtype=torch.float64).item()
        total += x.double().sum(0)
        square += x.double().square().sum().item()
        fired |= (f > 0).any(0)
    spread = square - (total.square().sum() / n).item()
    dead = 1 - fired.float().mean().item()
    return Reconstruction(mse / n, error / spread, cosine / n, l0 / n, l1_norm / n, dead, n)


def through_sae(sae: SAE, backbone: Backbone, tokens: Tokens = Tokens.ALL) -> Edit:
    """Return an edit that replaces tokens [B, T, d] by their reconstruction (mode `replace`)."""
    return _on_columns(backbone, tokens, lambda x: sae(x.float()))


def zeroed(backbone: Backbone, tokens: Tokens = Tokens.ALL) -> Edit:
    """Return an edit that sets tokens to zero: the floor that 'recovered' scores are measured from."""
    return _on_columns(backbone, tokens, torch.zeros_like)


def _on_columns(backbone: Backbone, tokens: Tokens, change: Edit) -> Edit:
    columns = torch.from_numpy(token_columns(backbone, tokens)).to(backbone.device)

    def edit(x: Tensor) -> Tensor:
        x = x.clone()
        x[:, columns] = change(x[:, columns]).to(x.dtype)
        return x

    return edit


@torch.no_grad()
def edited_embeddings(
    backbone: Backbone,
    images: ImageSet,
    edits: Sequence[Edit | None],
    batch_size: int = 32,
    progress: str | None = None,
) -> Tensor:
    """Embed images under several edits of the residual stream, the trunk run once.

    `edits` are functions of tokens [B, T, d]; None leaves the stream as it is. Returns float32
    [E, N, e] on the backbone's device, not normalised.
    """
    rows, finish = [], Tail(backbone)
    for batch in images.batches(batch_size, progress=progress):
        x = backbone.residual(backbone.normalize(batch.images))
        rows.append(torch.stack([finish(x if e is None else e(x)).float() for e in edits]))
    return torch.cat(rows, dim=1)


@torch.no_grad()
def zero_shot(
    backbone: Backbone,
    images: ImageSet,
    text: Tensor,
    edits: Sequence[Edit | None],
    batch_size: int = 32,
    progress: str | None = "classifying",
) -> ZeroShot:
    """Classify images under several edits of the residual stream; `text` [C, e] is one vector per class."""
    labels = torch.from_numpy(images.labels).to(backbone.device)
    predictions, losses = [], []
    for embeddings in edited_embeddings(backbone, images, edits, batch_size, progress):
        logits = zero_shot_logits(backbone, embeddings, text)
        predictions.append(logits.argmax(-1).cpu().numpy())
        losses.append(F.cross_entropy(logits.double(), labels, reduction="none").cpu().numpy())
    return ZeroShot(np.stack(predictions), np.stack(losses))


def recovered(original: float, edited: float, floor: float) -> float:
    """Return (edited - floor) / (original - floor) of accuracies or cross-entropies (facts.md §7).

    1 where nothing is lost, 0 where the edit is as bad as the floor; not clipped, NaN where the floor is
    no worse than the original.
    """
    return (edited - floor) / (original - floor) if original != floor else float("nan")


@torch.no_grad()
def contrastive_loss(
    sae: SAE,
    backbone: Backbone,
    images: ImageSet,
    batch_images: int = 1024,
    text: str = "A photo of a {name}.",
    seed: int = 0,
    draws: int = 10,
    batch_size: int = 32,
    progress: str | None = "contrastive loss",
) -> ContrastiveLoss:
    """Measure the contrastive loss with the CLS token as it is, reconstructed, and zeroed (facts.md §4.4).

    Only the CLS token is changed, whatever tokens the SAE was trained on. Every draw is a batch of images,
    a function of (seed, number) alone, scored under all three; the trunk runs once per image that is drawn.
    Draws from a set that is hardly larger than a batch overlap, and their standard deviation is too small.

    Parameters
    ----------
    batch_images : images of a batch (of one image per class: at most so many); Table 2 fits 1024
    text : caption of an image, `{name}` its class name
    draws : batches of either kind

    Raises
    ------
    PatchSAEError : the set has fewer images than a batch, or only one class.
    """
    if "{name}" not in text:
        raise PatchSAEError(f"text='{text}' has no place for the class name; put {{name}} where it goes.")
    if draws < 2:
        raise PatchSAEError(f"draws={draws} has no standard deviation; take at least 2.")
    rngs = [np.random.default_rng([seed, number]) for number in range(draws)]
    batches = [*_at_random(images, batch_images, rngs), *_one_per_name(images, batch_images, rngs)]
    used, where = np.unique(np.concatenate(batches), return_inverse=True)
    edits = (None, through_sae(sae, backbone, Tokens.CLS), zeroed(backbone, Tokens.CLS))
    pictures = edited_embeddings(backbone, images.subset(used), edits, batch_size, progress)
    labels = images.labels[used]
    classes, name_of = np.unique(labels, return_inverse=True)
    captions = [text.replace("{name}", images.classnames[label]) for label in classes]
    words = torch.cat([backbone.encode_text(captions[i : i + 256]) for i in range(0, len(captions), 256)])
    losses = np.array(
        [
            [_symmetric_loss(backbone, embeddings[rows], words[name_of[rows]]) for embeddings in pictures]
            for rows in np.split(where, np.cumsum([len(batch) for batch in batches])[:-1])
        ]
    )  # [2 · draws, 3]
    return ContrastiveLoss(
        _contrast(losses[:draws], len(batches[0])), _contrast(losses[draws:], len(batches[-1]))
    )


def _contrast(losses: np.ndarray, images: int) -> Contrast:
    original, through, zero = losses.T
    score = (through - original) / (zero - original)
    spreads = [Spread(float(v.mean()), float(v.std(ddof=1))) for v in (original, through, zero, score)]
    return Contrast(*spreads, images)


def _at_random(images: ImageSet, n: int, rngs: list[np.random.Generator]) -> list[np.ndarray]:
    if len(images) < n:
        raise PatchSAEError(
            f"a batch of batch_images={n} cannot be drawn from the {len(images)} images of "
            f"'{images.name}'; take more images, or a smaller batch."
        )
    return [rng.permutation(len(images))[:n] for rng in rngs]


def _one_per_name(images: ImageSet, n: int, rngs: list[np.random.Generator]) -> list[np.ndarray]:
    # by name: some of ImageNet's classes share one (facts.md §3), and their captions would be the same
    names = np.unique(np.array(images.classnames)[images.labels], return_inverse=True)[1]
    if names.max(initial=0) < 1:
        raise PatchSAEError(f"'{images.name}' has images of one class; a contrast needs two.")
    drawn = []
    for rng in rngs:
        mixed = rng.permutation(len(images))
        firsts = np.unique(names[mixed], return_index=True)[1]
        drawn.append(mixed[rng.permutation(firsts)[:n]])
    return drawn


def _symmetric_loss(backbone: Backbone, pictures: Tensor, words: Tensor) -> float:
    logits = zero_shot_logits(backbone, pictures, words.float()).double()  # [B images, B texts]
    own = torch.arange(len(logits), device=logits.device)
    return ((F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2).item()


def label_rank(logits: Tensor, labels: Tensor) -> Tensor:
    """Count the classes that come before the true one: logits [..., C], labels [...] to int64 [...].

    Equal logits come in the order of the classes, as argmax has it, so that of two classes of one name
    (facts.md §3) the second is never first.

    Raises
    ------
    PatchSAEError : a logit is not finite; no class comes before NaN, which would make it a right answer.
    """
    check_finite("what is ranked", logits, "use dtype float32, or check the weights")
    own = logits.gather(-1, labels[..., None])
    earlier = torch.arange(logits.shape[-1], device=logits.device) < labels[..., None]
    return ((logits > own) | ((logits == own) & earlier)).sum(-1)


def text_digest(text: Tensor) -> str:
    """Hash text vectors [C, e] by their first six decimals, for stage manifests."""
    return short_hash(text.double().cpu().numpy().round(6).tolist())


def per_class_accuracy(rank: np.ndarray, labels: np.ndarray, classes: int, top: int = 1) -> Interval:
    """Return each class's share of images whose label is among the `top` most likely: float64 [C].

    `rank` [N] counts the classes before the true one, as `label_rank` does. Intervals are Wilson's; NaN for
    a class without images. The mean of `value` is the paper's metric (facts.md §4.8).
    """
    of = np.bincount(labels, minlength=classes)
    return wilson(np.bincount(labels[rank < top], minlength=classes), of)
