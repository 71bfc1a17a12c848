"""The residual stream of an image set on disk: made for several blocks in one pass, read as images are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from patchsae.clip.backbone import Backbone
from patchsae.images.sets import Batch, ImageSet, short_hash
from patchsae.runs.errors import PatchSAEError
from patchsae.runs.processes import Processes
from patchsae.training.activations import SHARD_IMAGES, Activations, Tokens, token_columns


def parts_of(images: ImageSet) -> int:
    """Count the parts in which `fill` makes the caches of an image set."""
    return -(-len(images) // SHARD_IMAGES)


def fill(
    images: ImageSet, wanted: Sequence[tuple[Backbone, Tokens]], root: str | Path, part: int, parts: int
) -> None:
    """Make one part of several caches: an image is decoded once and sent through the blocks once.

    The caches are those that `Activations` makes one by one, bit for bit. Parts may be made by several
    processes; part 0 comes last, because it marks the caches as finished.

    Parameters
    ----------
    wanted : backbones, which share their weights, and the tokens to be kept of each
    root : folder of the caches
    part : 0 … parts - 1, where parts = `parts_of(images)`
    """
    backbone, blocks = wanted[0][0], {cut.block for cut, _ in wanted}

    # of one part: 0.3 GB for four blocks of ViT-B/16
    @cache
    def passed(indices: tuple[int, ...]) -> dict[int, Tensor]:
        found = backbone.residuals(backbone.normalize(images.load(indices).images), blocks)
        return {block: _rounded(x, backbone, block, images) for block, x in found.items()}

    for cut, tokens in wanted:
        through = _Passed(images, passed, cut.block, token_columns(cut, tokens))
        Activations(through, cut, tokens, cache=root, processes=Processes(part, parts))


def from_cache(
    images: ImageSet, backbone: Backbone, cache: str | Path, image_batch: int = 64
) -> tuple[ImageSet, Backbone]:
    """Return images and backbone for evaluation that read the residual stream from disk, made if missing.

    Whatever takes (images, backbone) and asks for `backbone.residual(backbone.normalize(pixels))` gets the
    tokens, rounded to float16, while no image is decoded and no block before the hook runs; `finish` and
    the text side are the backbone's own. Without a cache ('') both come back as they are.
    """
    if not cache:
        return images, backbone
    kept = Activations(images, backbone, Tokens.ALL, cache=cache, image_batch=image_batch)
    if kept.tokens != backbone.n_tokens:
        raise PatchSAEError(f"{backbone.name} has prompt tokens, which are never cached; give cache=''.")
    return _Remembered(images, kept), _Past(backbone)


def _rounded(x: Tensor, backbone: Backbone, block: int, images: ImageSet) -> Tensor:
    if x.isnan().any():  # values that are infinite, or become so, are refused where they are written
        raise PatchSAEError(
            f"the residual stream of {backbone.name} after block {block} has NaN values on "
            f"'{images.name}'; use dtype float32, or check the weights."
        )
    return x.half().cpu()


class _Other(ImageSet):
    """An image set whose pixels are something else that was made of them."""

    def __init__(self, images: ImageSet):
        self.of, self.name, self.split = images, images.name, images.split
        self.classnames, self.labels = images.classnames, images.labels

    def check_readable(self, indices: Sequence[int]) -> None:
        self.of.check_readable(indices)

    def _batch(self, indices: Sequence[int], x: Tensor) -> Batch:
        where = np.asarray(indices, dtype=np.int64)
        return Batch(x, torch.from_numpy(self.labels[where]), torch.from_numpy(where))


class _Passed(_Other):
    """An image set whose pixels are its tokens after one block, from a pass through several."""

    def __init__(self, images: ImageSet, passed: Callable, block: int, columns: np.ndarray):
        super().__init__(images)
        self.passed, self.block, self.columns = passed, block, torch.from_numpy(columns)

    def load(self, indices: Sequence[int]) -> Batch:
        tokens = self.passed(tuple(int(i) for i in indices))[self.block]
        return self._batch(indices, tokens[:, self.columns])

    def fingerprint(self) -> str:
        # the cache of these is the cache of the images
        return self.of.fingerprint()


class _Remembered(_Other):
    """An image set whose pixels are the tokens of its images, read from a cache."""

    def __init__(self, images: ImageSet, kept: Activations):
        super().__init__(images)
        self.source = kept.source

    def load(self, indices: Sequence[int]) -> Batch:
        return self._batch(indices, self.source.read(indices))

    def fingerprint(self) -> str:
        # the tokens are rounded: what is made of them is not what the pixels would have given
        return short_hash([self.of.fingerprint(), str(torch.float16)])


class _Past:
    """A backbone whose input is its own residual stream."""

    def __init__(self, backbone: Backbone):
        self.of = backbone

    def __getattr__(self, name: str) -> object:
        return getattr(self.of, name)

    def normalize(self, tokens: Tensor) -> Tensor:
        return tokens

    def residual(self, tokens: Tensor) -> Tensor:
        return tokens.to(self.of.device, self.of.dtype)
