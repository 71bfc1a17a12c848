"""How well latents localize: every latent's map on every image against the labelled object's mask.

One pass keeps a sparse table: a row for each (image, latent) where the latent fires. Everything else (best
latent per class, controls, intervals) is read from the table. A latent that is silent on an image points
nowhere, and scores 0 there. Masks are for scoring only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import StrEnum
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from patchsae.clip.backbone import Backbone
from patchsae.latents.maps import Fired, covered_pixels, fired
from patchsae.latents.spatial import morans_i
from patchsae.runs.checks import check_counts
from patchsae.runs.errors import PatchSAEError
from patchsae.runs.progress import progress_bar
from patchsae.runs.threads import ranges, spread
from patchsae.sae.cpu_kernels import compiled
from patchsae.sae.model import SAE

ROWS = 4096  # table rows per task


class Metric(StrEnum):
    """Scores of a map against a mask, each 0 … 1."""

    IOU = "iou"  # map > τ, enlarged to the image (nearest), against the mask
    BEST_IOU = "best_iou"  # the same at the best threshold ≥ 0 of each image: an upper bound
    POINTING = "pointing"  # 1 if the strongest patch's centre is in the mask; ties to the lowest patch
    PRECISION = "precision"  # average precision of patch activations; patches half covered are positive


METRICS = tuple(Metric)


class Scores(NamedTuple):
    """The scores of S latents on N images, only where they fire."""

    image: np.ndarray  # [R] int64; rows ascend by (image, latent)
    latent: np.ndarray  # [R] int64
    value: np.ndarray  # [4, R] float32, in the order of Metric
    activation: np.ndarray  # [R] float32, mean over patches
    moran: np.ndarray  # [R] float32, Moran's I of the map; NaN for a map without contrast
    chance: np.ndarray  # [4, N] float32, what a map that ignores the image gets: areas of the object
    labels: np.ndarray  # [N] int64
    group: np.ndarray  # [N] int64, which of the image sets
    index: np.ndarray  # [N] int64, the image's number in its set
    objects: np.ndarray  # [N] int64, how many objects it shows
    latents: int  # S
    left_out: int  # images whose object covers no patch by half; not among the N


class Masked(Protocol):
    """What a batch of images shows."""

    images: Tensor  # [B, 3, H, W] uint8
    masks: Tensor  # [B, H, W]; 0 where no object is, i + 1 on object i; object 0 is the label
    concepts: np.ndarray  # [B, objects], -1 where there is no more object


class MaskedSet(Protocol):
    """An image set that knows where the labelled object is."""

    labels: np.ndarray

    def __len__(self) -> int: ...

    def scenes(self, indices: np.ndarray) -> Masked: ...


class Pass(NamedTuple):
    """What one pass over the images gave."""

    scores: dict[str, Scores]  # by the names of the SAEs
    embeddings: dict[str, np.ndarray]  # float32 [N, e], by the names of the encoders


Encoder = Callable[[Tensor, Tensor], Tensor]  # images uint8 [B, 3, H, W], tokens [B, T, d] → [B, e]
Mapper = Callable[[Tensor], Fired]  # patch tokens [B, P, d] → maps of any other kind


@torch.no_grad()
def score_latents(
    saes: Mapping[str, SAE | Mapper],
    backbone: Backbone,
    sets: Mapping[str, MaskedSet],
    tau: float = 0.2,
    blocks: Mapping[str, int] | None = None,
    encoders: Mapping[str, Encoder] | None = None,
    batch_size: int = 16,
    progress: bool = True,
) -> Pass:
    """Score every latent of several SAEs on the same images, the trunk run once.

    Parameters
    ----------
    saes : by name; a function gives other maps than those of latents, as `token_length` does
    tau : threshold of Metric.IOU
    blocks : block whose output an SAE reads, for those that do not read the backbone's
    encoders : what to embed the images with; tokens are those after the backbone's own block

    Raises
    ------
    PatchSAEError : a batch of no images; a set without masks; τ < 0; no image with a visible object.
    """
    check_counts(batch_size=batch_size)
    if not tau >= 0:
        raise PatchSAEError(f"tau={tau} must not be negative; the paper uses 0.2.")
    if bad := [name for name, images in sets.items() if not hasattr(images, "scenes")]:
        raise PatchSAEError(f"'{bad[0]}' has no object masks to score against; take the embedded scenes.")
    block = {name: (blocks or {}).get(name, backbone.block) for name in saes}
    patches = torch.from_numpy(np.flatnonzero(backbone.token_kind == "patch")).to(backbone.device)
    parts: dict[str, list[tuple[np.ndarray, ...]]] = {name: [] for name in saes}
    embedded: dict[str, list[Tensor]] = {name: [] for name in encoders or {}}
    chance, about, seen, left_out = [], [], 0, 0
    batches = [
        (group, images, np.arange(first, min(first + batch_size, len(images))))
        for group, images in enumerate(sets.values())
        for first in range(0, len(images), batch_size)
    ]
    for group, images, rows in progress_bar(batches, desc="scoring", unit="batch", shown=progress):
        scenes = images.scenes(rows)
        truth = _truth(scenes.masks == 1, backbone.grid)
        keep = np.flatnonzero(truth.positive.any(1))
        left_out += len(rows) - len(keep)
        if not len(keep):
            continue
        truth = Truth(*(part[keep] if part.ndim > 1 else part for part in truth))
        pixels = scenes.images[torch.from_numpy(keep).to(scenes.images.device)]
        streams = backbone.residuals(backbone.normalize(pixels), {*block.values(), backbone.block})
        for name, sae in saes.items():
            x = streams[block[name]][:, patches]
            found = fired(sae, x) if isinstance(sae, SAE) else sae(x)
            values = _score(found, truth, tau, backbone.grid)
            parts[name].append((found.image + seen, found.latent, *values))
        for name, encode in (encoders or {}).items():
            embedded[name].append(encode(pixels, streams[backbone.block]).float().cpu())
        chance.append(truth.chance())
        objects = (scenes.concepts[keep] >= 0).sum(1)
        about.append(np.stack([images.labels[rows[keep]], np.full(len(keep), group), rows[keep], objects]))
        seen += len(keep)
    if not seen:
        raise PatchSAEError("no image shows its object on at least half of a patch; take other images.")
    common = np.concatenate(chance, 1), *np.concatenate(about, 1)
    latents = {name: getattr(sae, "d_sae", 1) for name, sae in saes.items()}
    tables = {name: _table(parts[name], common, latents[name], left_out) for name in saes}
    return Pass(tables, {name: torch.cat(rows).numpy() for name, rows in embedded.items()})


def token_length(centre: Tensor) -> Mapper:
    """Return a function whose one map is how far each patch token lies from `centre` [d].

    It asks how much of a mask comes from the length of tokens alone, without any direction.
    """

    def maps(x: Tensor) -> Fired:
        length = (x.float() - centre).norm(dim=-1).cpu().numpy()  # [B, P]
        images, patches = length.shape
        rows = np.arange(images)
        start = np.arange(images + 1) * patches
        patch = np.tile(np.arange(patches), images)
        return Fired(rows, np.zeros(images, np.int64), start, patch, length.ravel())

    return maps


class Truth(NamedTuple):
    """The masks of B images, as far as a patch map can tell them apart."""

    covered: np.ndarray  # [B, P] float32, pixels of each patch inside the mask
    centre: np.ndarray  # [B, P] bool, the patch's central pixel is inside
    positive: np.ndarray  # [B, P] bool, the patch is covered by half or more
    pixels: np.ndarray  # [P] float32

    def chance(self) -> np.ndarray:
        """Return what maps that ignore the image get, [4, B] float32."""
        area = self.covered.sum(1) / self.pixels.sum()
        return np.stack([area, area, self.centre.mean(1), self.positive.mean(1)]).astype(np.float32)


def _truth(masks: Tensor, grid: tuple[int, int]) -> Truth:
    covered = covered_pixels(masks, grid).cpu().numpy()
    pixels = covered_pixels(torch.ones_like(masks[:1]), grid)[0].cpu().numpy()
    middle = [
        (np.arange(cells) * side + side // 2) // cells
        for side, cells in zip(masks.shape[-2:], grid, strict=True)
    ]
    centre = masks.cpu().numpy()[:, middle[0]][:, :, middle[1]].reshape(len(masks), -1)
    return Truth(covered, centre, covered * 2 >= pixels, pixels)


def _score(found: Fired, truth: Truth, tau: float, grid: tuple[int, int]) -> tuple[np.ndarray, ...]:
    value = np.empty((len(METRICS), len(found.image)), np.float32)
    activation = np.empty(len(found.image), np.float32)
    args = (*found[:1], *found[2:], *truth, np.float32(tau), value, activation)
    spread(lambda a, b: compare(*args, a, b), ranges(len(found.image), ROWS))
    return value, activation, morans_i(found, grid)


def _table(parts: list, common: tuple[np.ndarray, ...], latents: int, left_out: int) -> Scores:
    columns = zip(*parts, strict=True)
    image, latent, value, activation, moran = (np.concatenate(rows, -1) for rows in columns)
    order = np.lexsort((latent, image))
    rows = image[order], latent[order], value[:, order], activation[order], moran[order]
    return Scores(*rows, *common, latents, left_out)


@compiled
def compare(
    image, start, patch, value, covered, centre, positive, pixels, tau, score, activation, first, last
):  # fmt: skip
    """Score rows first … last-1 of a `Fired` (facts.md §7)."""
    patches = len(pixels)
    for row in range(first, last):
        a, b, i = start[row], start[row + 1], image[row]
        size, positives = 0.0, 0
        for p in range(patches):
            size += covered[i, p]
            positives += positive[i, p]
        total, strongest, inside, outside = 0.0, a, 0.0, 0.0
        for e in range(a, b):
            total += value[e]
            if value[e] > value[strongest]:  # patches ascend: ties stay with the lowest
                strongest = e
            if value[e] > tau:
                inside += covered[i, patch[e]]
                outside += pixels[patch[e]] - covered[i, patch[e]]
        score[0, row] = inside / (size + outside)
        score[2, row] = centre[i, patch[strongest]]
        activation[row] = total / patches
        # down through the distinct values; patches of one value enter together, silent ones last
        order = np.argsort(-value[a:b])
        best, precision, inside, outside, hits, before = 0.0, 0.0, 0.0, 0.0, 0, 0
        for rank in range(b - a):
            e = a + order[rank]
            hits += positive[i, patch[e]]
            inside += covered[i, patch[e]]
            outside += pixels[patch[e]] - covered[i, patch[e]]
            if rank == b - a - 1 or value[a + order[rank + 1]] < value[e]:
                best = max(best, inside / (size + outside))
                precision += (hits - before) / positives * hits / (rank + 1)
                before = hits
        precision += (positives - hits) / positives * positives / patches
        score[1, row], score[3, row] = best, precision
