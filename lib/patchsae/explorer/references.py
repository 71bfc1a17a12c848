"""Reference images of latents as blocks: thumbnails, and where each latent fires on them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from patchsae.clip.backbone import Backbone
from patchsae.clip.tail import Tail
from patchsae.explorer.data import BATCH, References, activations_of
from patchsae.explorer.packing import as_picture, data_uri, pack, sheet
from patchsae.runs.progress import progress_bar
from patchsae.sae.model import SAE

LATENTS = 64  # latents per block of references
CELLS = 30  # reference images per sheet

Maps = dict[tuple[int, int], tuple[np.ndarray, np.ndarray]]  # (rank, latent): patches, activations


class Looks(NamedTuple):
    """How the references of the first set look to CLIP."""

    mean: np.ndarray  # [S, e] mean unit embedding of each latent's references, NaN where it has none
    tokens: Tensor  # [1, T, d] mean residual stream of all of them


@torch.no_grad()
def write_references(write, sae, clip, sets, found, config, progress) -> Looks | None:
    """Write the references of some sets; return how those of the first look, None without a set."""
    encoded, looks, tail = [], None, Tail(clip)
    for number, (one, refs) in enumerate(zip(sets, found, strict=True)):
        maps: Maps = {}
        embeddings, total = [], 0
        with progress_bar(total=len(refs.images), desc=f"references of {one.title}", shown=progress) as bar:
            for page, first in enumerate(range(0, len(refs.images), CELLS)):
                cells = refs.images[first : first + CELLS]
                pixels = one.images.load(cells).images
                write(f"sheet-{number}-{page}", partial(_reference_sheet, pixels, config.thumbnail))
                x = torch.cat([clip.residual(clip.normalize(part)) for part in pixels.split(BATCH)])
                maps |= _reference_maps(sae, clip, refs, cells, x)
                if not number:
                    embeddings.append(F.normalize(tail(x).float(), dim=-1).cpu().numpy())
                    total = total + x.sum(0, keepdim=True)
                bar.update(len(cells))
        encoded.append(maps)
        if embeddings:
            looks = Looks(_mean_look(refs, np.concatenate(embeddings)), total / len(refs.images))
    for chunk, first in enumerate(range(0, sae.d_sae, LATENTS)):
        latents = range(first, min(first + LATENTS, sae.d_sae))
        parts = list(zip(found, encoded, strict=True))
        write(f"refs-{chunk}", lambda latents=latents, parts=parts: _reference_block(latents, parts))
    return looks


def _mean_look(refs: References, embeddings: np.ndarray) -> np.ndarray:
    there = refs.index >= 0
    total = np.zeros((refs.index.shape[1], embeddings.shape[1]), np.float32)
    for row, used in zip(refs.index, there, strict=True):
        total[used] += embeddings[np.searchsorted(refs.images, row[used])]
    with np.errstate(invalid="ignore"):
        return total / there.sum(0)[:, None]


def _reference_sheet(pixels: Tensor, side: int) -> dict[str, str]:
    return {"sheet": data_uri(sheet([as_picture(one) for one in pixels], side), 80)}


def _reference_maps(sae: SAE, clip: Backbone, refs: References, cells: np.ndarray, x: Tensor) -> Maps:
    """Compute where each latent fires on those of its reference images that are among the cells."""
    maps: Maps = {}
    shown = [one for part in x.split(BATCH) for one in activations_of(sae, clip, part)]
    for index, image in zip(cells, shown, strict=True):
        for rank, latent in zip(*np.nonzero(refs.index == index), strict=True):
            row = int(np.searchsorted(image.latent, latent))
            # another batch may round a latent's faintest activation to none
            if row < len(image.latent) and image.latent[row] == latent:
                entries = slice(image.start[row], image.start[row + 1])
                maps[int(rank), int(latent)] = image.patch[entries], image.value[entries]
    return maps


def _reference_block(latents: range, parts: Sequence[tuple[References, Maps]]) -> dict[str, Any]:
    """Return the references of some latents: arrays run over latents, and over ranks inside a latent."""
    block = []
    for refs, maps in parts:
        here = np.s_[:, latents.start : latents.stop]
        index = refs.index[here].T.ravel()
        start, patches, weights = [0], [], []
        for latent in latents:
            rows = [
                maps.get((rank, latent), (np.zeros(0, int), np.zeros(0))) for rank in range(len(refs.index))
            ]
            peak = max((value.max(initial=0) for _, value in rows), default=0)
            for patch, value in rows:
                patches.append(patch)
                weights.append(np.rint(255 * value / max(peak, 1e-12)).astype(np.uint8))
                start.append(start[-1] + len(patch))
        block.append({
            # 0 is no image, so that the array has no sign
            "cell": pack(np.where(index >= 0, np.searchsorted(refs.images, index) + 1, 0)),
            "value": pack(refs.value[here].T.ravel()),
            "label": pack(np.maximum(refs.label[here].T.ravel(), 0)),
            "start": pack(np.array(start)),
            "patch": pack(np.concatenate(patches)),
            "weight": pack(np.concatenate(weights)),
        })  # fmt: skip
    return {"sets": block}
