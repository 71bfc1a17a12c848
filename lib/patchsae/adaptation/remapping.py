"""CLIP against an adapted CLIP in one dictionary: do others fire, or do the same mean something else?

Counts are class- or data-set-level activations (Eq. 5) of the same images under both backbones, one SAE.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import xarray as xr
from safetensors.numpy import load_file, save_file
from torch import Tensor

from patchsae.clip.backbone import Backbone, zero_shot_logits
from patchsae.clip.tail import Tail
from patchsae.images.sets import ImageSet
from patchsae.masking.sweep import check_whole, chunks, read_chunk, write_chunk
from patchsae.masking.through import label_rank, text_digest
from patchsae.runs.checks import check_counts
from patchsae.runs.disk import remove
from patchsae.runs.errors import PatchSAEError
from patchsae.runs.progress import progress_bar
from patchsae.runs.stage import Stage, write_atomic
from patchsae.sae.model import SAE
from patchsae.training.activations import Tokens, token_columns

VERSION = 1  # raised when the same inputs give other answers of the mixtures
UPPER, LOWER = 50, 100  # ranks that bound 'high' and 'low' (paper §4.2.1)


class Reading(StrEnum):
    """How the paper's bounds "using top-50 and top-100 values" are read (facts.md §4.9)."""

    VALUE = "value"  # bounds are the 50th and 100th largest counts, both models pooled
    MEMBERSHIP = "membership"  # high is in a model's top 50, low is outside its top 100


class Groups(NamedTuple):
    """Which latents are in which region of the scatter (Fig. 17): bool, of the counts' shape."""

    high: np.ndarray
    """High in both models."""
    high_to_low: np.ndarray
    """High in CLIP, low in the adapted model."""
    low_to_high: np.ndarray
    """Low in CLIP, high in the adapted model."""


def compare_counts(
    before: np.ndarray, after: np.ndarray, reading: Reading = Reading.VALUE, upper: int = UPPER,
    lower: int = LOWER,
) -> Groups:  # fmt: skip
    """Sort latents into the regions of Fig. 17 by their counts [..., S] in both models.

    A latent that never fires is never high. Raises PatchSAEError unless 1 ≤ upper ≤ lower ≤ S.
    """
    if before.shape != after.shape:
        raise PatchSAEError(f"counts have shapes {before.shape} and {after.shape}; use the same classes.")
    if not 1 <= upper <= lower <= before.shape[-1]:
        raise PatchSAEError(
            f"upper={upper} and lower={lower} must satisfy 1 ≤ upper ≤ lower ≤ {before.shape[-1]}."
        )
    if Reading(reading) is Reading.VALUE:
        pooled = -np.sort(-np.concatenate([before, after], -1), axis=-1)
        high, low = pooled[..., upper - 1, None], pooled[..., lower - 1, None]
        tall = [(count >= high) & (count > 0) for count in (before, after)]
        small = [count < low for count in (before, after)]
    else:
        ranks = [_rank(count) for count in (before, after)]
        tall = [(rank < upper) & (count > 0) for rank, count in zip(ranks, (before, after), strict=True)]
        small = [rank >= lower for rank in ranks]
    return Groups(tall[0] & tall[1], tall[0] & small[1], small[0] & tall[1])


def _rank(count: np.ndarray) -> np.ndarray:
    order, rank = np.argsort(-count, axis=-1, kind="stable"), np.empty(count.shape, np.int64)
    np.put_along_axis(rank, order, np.broadcast_to(np.arange(count.shape[-1]), count.shape), -1)
    return rank


def class_counts(atlas: xr.Dataset, include_prompt_tokens: bool = False) -> np.ndarray:
    """Return a_c[s] of an atlas, int64 [C, S], over CLS and patches, or prompt tokens too (facts.md §1.4).

    Raises PatchSAEError if prompt tokens are asked for and the atlas did not count them.
    """
    kinds = [str(kind) for kind in atlas.kind.values]
    if include_prompt_tokens and "prompt" not in kinds:
        raise PatchSAEError(
            f"the atlas of '{atlas.attrs.get('name')}' has no prompt tokens; make it with "
            f"include_prompt_tokens=True and an adapted backbone that has some."
        )
    kept = [kind for kind in kinds if kind != "prompt" or include_prompt_tokens]
    return atlas.class_count_kind.sel(kind=kept).values.sum(0, dtype=np.int64)


def correlation(before: np.ndarray, after: np.ndarray) -> float:
    """Return Pearson's correlation of counts [S] over the latents that fire in either model (Fig. 20)."""
    active = (before > 0) | (after > 0)
    if active.sum() < 2:
        return float("nan")
    with np.errstate(invalid="ignore", divide="ignore"):
        return float(np.corrcoef(before[active], after[active])[0, 1])


def improvement_rate(before: float, after: float) -> float:
    """Return Δ = (adapted - zero-shot) / (1 - zero-shot) of accuracies in 0 … 1 (paper §4.2.1)."""
    return (after - before) / (1 - before) if before < 1 else float("nan")


def selection_half(labels: np.ndarray) -> np.ndarray:
    """Mark every other image [N] of each class, bool [N]: what sets are chosen on, and not tested on.

    Images are counted class by class, so that of classes with one image every other is marked.
    """
    marked = np.zeros(len(labels), bool)
    marked[np.argsort(labels, kind="stable")[::2]] = True
    return marked


class Parts(NamedTuple):
    """From which model, 0 CLIP or 1 adapted, each part of a mixed model is taken."""

    stream: int
    """What is seen: CLS and patches after the hooked block."""
    prompt_tokens: int
    """The learned image tokens, those beside the stream and those that later blocks get, if there are any.
    One that entered early has looked at the image since. Where weights were adapted, the blocks after the
    hook belong here; otherwise all else after it is the same in both models."""
    words: int
    """The text vectors of the classes."""


PARTS = tuple(Parts(*(number >> shift & 1 for shift in (2, 1, 0))) for number in range(8))


class Mixed(NamedTuple):
    """Rank of the true class, 0 if right, int64 [N], under every mixture of two models' parts."""

    tokens: dict[Parts, np.ndarray]
    """What is seen is the tokens themselves."""
    latents: dict[Parts, np.ndarray]
    """What is seen is what the SAE rebuilds of them."""


def mix_models(
    sae: SAE,
    sae_hash: str,
    plain: Backbone,
    adapted: Backbone,
    images: ImageSet,
    texts: tuple[Tensor, Tensor],
    root: str | Path,
    batch_size: int = 32,
    progress: bool = True,
) -> Mixed:
    """Classify images with every mixture of CLIP's and an adapted model's parts, or read the result.

    Pure mixtures, all 0 or all 1, are the two models. A run that was killed goes on at the first unfinished
    chunk of images; a second process waits and reads.

    Parameters
    ----------
    sae_hash : names the SAE, as in `make_atlas`
    texts : [C, e] text vectors of CLIP and of the adapted model

    Raises
    ------
    PatchSAEError : a batch of no images; the backbones are cut after different blocks; a saved chunk
        is damaged.
    """
    check_counts(batch_size=batch_size)
    if plain.block != adapted.block:
        raise PatchSAEError(
            f"CLIP is cut after block {plain.block}, the adapted model after {adapted.block}; "
            f"cut both alike."
        )
    inputs = {
        "images": images.fingerprint(),
        "models": [plain.fingerprint(), adapted.fingerprint()],
        "sae": sae_hash,
        "weights": sae.fingerprint(),
        "texts": [text_digest(text) for text in texts],
    }
    stage = Stage.open(root, f"mixed-{images.name.replace('/', '-')}", inputs, version=VERSION)
    path = stage.path / "ranks.safetensors"

    def make() -> None:
        paths = list(_mix(sae, (plain, adapted), images, texts, batch_size, progress, stage))
        parts = [read_chunk(part, "these mixtures")["rank"] for part in paths]
        ranks = np.concatenate(parts, -1)
        check_whole(ranks.shape[-1], images, stage)
        write_atomic(path, lambda temporary: save_file({"rank": ranks}, temporary))
        stage.finish(path.name, images=len(images))
        remove(*paths)

    stage.once(make)
    ranks = load_file(path)["rank"]  # [tokens or latents, mixture, N]
    return Mixed(*(dict(zip(PARTS, rows, strict=True)) for rows in ranks))


def _mix(
    sae: SAE,
    models: tuple[Backbone, Backbone],
    images: ImageSet,
    texts: tuple[Tensor, Tensor],
    batch_size: int,
    progress: bool,
    stage: Stage,
) -> Iterator[Path]:
    """Yield the file of each chunk of images, made where it is not there."""
    parts = list(chunks(images, stage).items())
    bar = progress_bar(parts, desc=f"mixing models on {images.name}", unit="chunk", shown=progress)
    for path, indices in bar:
        if not path.exists():
            ranks = _mixed_ranks(sae, models, images, indices, texts, batch_size)
            write_chunk(path, {"rank": ranks})
        yield path


@torch.no_grad()
def _mixed_ranks(
    sae: SAE,
    models: tuple[Backbone, Backbone],
    images: ImageSet,
    indices: np.ndarray,
    texts: tuple[Tensor, Tensor],
    batch_size: int,
) -> np.ndarray:
    """Return the ranks [tokens or latents, mixture, N] of some images."""
    seen = [torch.from_numpy(token_columns(model, Tokens.ALL)).to(model.device) for model in models]
    tails, found = [Tail(model) for model in models], []
    for batch in images.batches(batch_size, indices):
        streams = [model.residual(model.normalize(batch.images)) for model in models]
        shown = [stream[:, columns] for stream, columns in zip(streams, seen, strict=True)]
        labels, rows = batch.labels.to(models[0].device), []
        for part in (shown, [sae(x.float()).to(x.dtype) for x in shown]):
            for stream, beside, words in PARTS:
                if not words:  # the parts before it are those of the next mixture too
                    tokens = streams[beside].clone()
                    tokens[:, seen[beside]] = part[stream]
                    embeddings = tails[beside](tokens)
                logits = zero_shot_logits(models[0], embeddings, texts[words])
                rows.append(label_rank(logits, labels))
        found.append(torch.stack(rows).view(2, len(PARTS), -1).cpu())
    return torch.cat(found, -1).numpy()


def group_table(
    before: Mapping[str, np.ndarray],
    after: Mapping[str, np.ndarray],
    readings: Sequence[Reading] = tuple(Reading),
) -> dict[tuple[str, str], dict[str, float]]:
    """Average group sizes over classes (Table 1, left): counts [C, S] by name to rows."""
    rows = {}
    for name in before:
        for reading in readings:
            groups = compare_counts(before[name], after[name], reading)
            sizes = {group: float(members.sum(-1).mean()) for group, members in groups._asdict().items()}
            rows[name, str(reading)] = sizes
    return rows
