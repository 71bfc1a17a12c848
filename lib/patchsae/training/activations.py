"""The tokens that a backbone makes of images: computed when asked for, or read from a cache on disk.

A cache holds every image of a set in the order of the set, so that any later run with the same backbone
and tokens, whatever its seed, reads it and never runs the backbone.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from enum import StrEnum
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from patchsae.clip.backbone import Backbone
from patchsae.images.loading import Pixels, Source, read_batches
from patchsae.images.sets import ImageSet
from patchsae.runs.checks import check_counts
from patchsae.runs.errors import PatchSAEError
from patchsae.runs.processes import Processes
from patchsae.runs.progress import progress_bar
from patchsae.runs.stage import Stage, write_atomic
from patchsae.runs.tensors import row_sums

VERSION = 1  # raised when the same inputs give other tokens
SHARD_IMAGES = 256
SUMS = "crc32"  # of the rows of a shard


class Tokens(StrEnum):
    """Which tokens the autoencoder sees (Fig. 8)."""

    ALL = "all"
    CLS = "cls"
    PATCHES = "patches"


def token_columns(backbone: Backbone, tokens: Tokens) -> np.ndarray:
    """Return the positions of the tokens that are used; prompt tokens never are (facts.md §1.4)."""
    kind = backbone.token_kind
    wanted = {
        Tokens.ALL: (kind == "cls") | (kind == "patch"),
        Tokens.CLS: kind == "cls",
        Tokens.PATCHES: kind == "patch",
    }
    columns = np.flatnonzero(wanted[Tokens(tokens)])
    if not len(columns):
        raise PatchSAEError(f"tokens='{tokens}' leaves none: {backbone.name} has no such token.")
    return columns


class Activations:
    """The tokens [B, T, d] of any images of a set.

    Parameters
    ----------
    cache : folder for shards, made here if they are not there; '' computes tokens when they are asked for.
        Shards are float16 and hold each image once, T · d · 2 bytes of it
    image_batch : images per pass of the backbone
    workers : processes that decode images, or read shards

    Raises
    ------
    PatchSAEError : passes of no images; an image or shard cannot be read; the stream has NaN or infinite
        values, or values that float16 cannot hold; the disk is too small for the cache.
    """

    def __init__(
        self,
        images: ImageSet,
        backbone: Backbone,
        tokens: Tokens = Tokens.ALL,
        *,
        cache: str | Path = "",
        image_batch: int = 64,
        workers: int = 0,
        processes: Processes = Processes(),  # noqa: B008  (immutable)
        progress: bool = False,
    ):
        check_counts(image_batch=image_batch)
        check_counts(0, workers=workers)
        self.images, self.backbone, self.workers = images, backbone, workers
        self.columns = token_columns(backbone, tokens)
        self.source: Source = Pixels(images)
        if cache:
            self.source = self._shards(Path(cache), image_batch, processes, progress)

    @property
    def tokens(self) -> int:
        """Tokens per image."""
        return len(self.columns)

    @torch.no_grad()
    def read(self, batches: Iterable[Sequence[int]], ahead: int = 2) -> Iterator[Tensor]:
        """Yield the tokens [B, T, d], float32 on the backbone's device, of each batch of indices.

        `ahead` batches are decoded in advance, if there are workers; the backbone itself runs only when
        the next batch is asked for.
        """
        for batch in read_batches(self.source, batches, self.workers, ahead):
            yield self._tokens(batch)

    def _tokens(self, batch: Tensor) -> Tensor:
        if batch.dtype != torch.uint8:
            return batch.to(self.backbone.device).float()
        columns = torch.from_numpy(self.columns).to(self.backbone.device)
        x = self.backbone.residual(self.backbone.normalize(batch))[:, columns].float()
        if not torch.isfinite(x).all():
            raise PatchSAEError(
                f"the residual stream of {self.backbone.name} after block {self.backbone.block} has NaN or "
                f"infinite values on '{self.images.name}'; use dtype float32, or check the weights."
            )
        return x

    def _shards(self, root: Path, image_batch: int, processes: Processes, progress: bool) -> Shards:
        shape = (len(self.images), self.tokens, self.backbone.d_model)
        inputs = {
            "images": self.images.fingerprint(),
            "backbone": self.backbone.fingerprint(),
            "columns": self.columns,
            "shape": shape,
            "shard_images": SHARD_IMAGES,
        }
        stage = Stage.open(root, "activations", inputs, version=VERSION)
        shards = Shards(stage.path, self.images.name, shape)
        # a finished cache is looked through too: a copy of it may have lost or cut a file
        if processes.agree(stage.done and all(map(shards.whole, range(len(shards))))):
            return shards
        with stage.alone() if processes.first else nullcontext():
            processes.wait()
            missing = [
                n for n in range(processes.rank, len(shards), processes.world) if not shards.whole(n)
            ]
            if missing:
                self.images.check_readable([i for number in missing for i in shards.images(number)])
                _check_space(stage.path, shards.bytes * len(missing) * processes.world // len(shards))
                self._fill(shards, missing, image_batch, progress and processes.first)
            processes.wait()
            if processes.first:
                # every row has a sum of its own: to hash hundreds of gigabytes again would take minutes
                stage.finish(bytes=shards.bytes)
        return shards

    def _fill(self, shards: Shards, numbers: list[int], image_batch: int, progress: bool) -> None:
        plan = [
            np.arange(start, min(start + image_batch, images.stop))
            for images in map(shards.images, numbers)
            for start in range(images.start, images.stop, image_batch)
        ]
        read = self.read(plan)
        title = f"caching the activations of '{shards.name}' ({shards.bytes / 1e9:.3g} GB)"
        for number in progress_bar(numbers, desc=title, unit="shard", shown=progress):
            parts = -(-len(shards.images(number)) // image_batch)
            x = torch.cat([next(read) for _ in range(parts)])
            largest, limit = x.abs().max().item(), torch.finfo(torch.float16).max
            if largest > limit:
                raise PatchSAEError(
                    f"the residual stream of {self.backbone.name} after block {self.backbone.block} "
                    f"reaches {largest:.3g}, more than float16 holds; train without a cache (cache='')."
                )
            shards.write(number, x.half())


class Shards(Source):
    """Tokens on disk: files of SHARD_IMAGES images, float16 [I, T, d], read row by row.

    Parameters
    ----------
    shape : images, tokens per image, width
    """

    def __init__(self, folder: Path, name: str, shape: tuple[int, int, int]):
        self.folder, self.name, self.shape = folder, name, shape

    def __len__(self) -> int:
        return -(-self.shape[0] // SHARD_IMAGES)

    @property
    def bytes(self) -> int:
        return int(np.prod(self.shape)) * 2

    def images(self, number: int) -> range:
        """Return the indices that shard `number` holds."""
        start = number * SHARD_IMAGES
        return range(start, min(start + SHARD_IMAGES, self.shape[0]))

    def path(self, number: int) -> Path:
        return self.folder / f"{number:06d}.safetensors"

    def whole(self, number: int) -> bool:
        """Tell whether a shard is there, of full length and of the right shape."""
        rows = len(self.images(number))
        try:
            with safe_open(self.path(number), framework="pt") as file:
                shapes = [file.get_slice(name).get_shape() for name in ("tokens", SUMS)]
        except (OSError, SafetensorError):
            return False
        return shapes == [[rows, *self.shape[1:]], [rows]]

    def write(self, number: int, x: Tensor) -> None:
        """Write one shard, atomically, with a sum of every row."""
        x = x.cpu().contiguous()
        tensors = {"tokens": x, SUMS: row_sums(x)}
        write_atomic(self.path(number), lambda path: save_file(tensors, path))

    def read(self, indices: Sequence[int]) -> Tensor:
        rows = []
        for index in indices:
            number, row = divmod(int(index), SHARD_IMAGES)
            try:
                rows.append(_opened(self.path(number))(row))
            except (OSError, ValueError, SafetensorError) as error:
                raise PatchSAEError(
                    f"'{self.path(number)}' is damaged ({error}); delete it, then run again, and it is "
                    "made anew."
                ) from error
        return torch.stack(rows)


@lru_cache(maxsize=64)
def _opened(path: Path) -> Callable[[int], Tensor]:
    # memory-mapped: of a shard's 77 MB (ViT-B/16) one image's 0.3 MB are read
    file = safe_open(path, framework="pt")
    rows, sums = file.get_slice("tokens"), file.get_tensor(SUMS)

    def read(row: int) -> Tensor:
        if row_sums((x := rows[row])[None])[0] != sums[row]:
            raise ValueError(f"row {row} is not what its sum says")
        return x

    return read


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise PatchSAEError(
            f"caching activations in '{folder}' takes {needed / 1e9:.3g} GB and {free / 1e9:.3g} GB are "
            f"free; name another folder as cache, take fewer images, or train without one (cache='')."
        )
