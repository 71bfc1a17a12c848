"""The tokens of an image set as optimiser batches, mixed across images.

The stream is cut into chunks of images. A chunk's images are dealt to lanes; each lane mixes the tokens
of its images, and every optimiser batch takes its share from every lane:

    chunk c ──┬─ lane 0: images 0, L, 2L, …  ── tokens mixed by (seed, c, 0) ──┐
              ├─ lane 1: images 1, L+1, …    ── tokens mixed by (seed, c, 1) ──┼─▶ batch 0, batch 1, …
              └─ lane L-1 …                                                   ─┘

A batch is thus a function of (seed, chunk, number) alone. Memory is bounded by one chunk, a stopped run
goes on with the very batches it would have seen, and k processes that take every k-th lane see together
what one process sees, without sending activations to each other.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from patchsae.clip.backbone import Backbone
from patchsae.images.sets import ImageSet
from patchsae.runs.errors import PatchSAEError, choose
from patchsae.runs.processes import Processes
from patchsae.training.activations import Activations, Tokens


@dataclass(frozen=True)
class StreamConfig:
    """Which tokens come in which order; the defaults are the paper's (App. A, facts.md §0)."""

    images: int = 2_621_440
    """Images seen, counted with repetition."""
    tokens: Tokens = Tokens.ALL
    """Which tokens of an image are used."""
    chunk_images: int = 1024
    """Images whose tokens are mixed with each other."""
    lanes: int = 8
    """Parts that a chunk is dealt to; as many processes, or a divisor of it, can share the work."""
    image_batch: int = 64
    """Images per pass of the backbone; a lane's images are cut into these."""
    token_batch: int = 4096
    """Tokens per optimiser step, all lanes together."""
    seed: int = 0
    """Seed of the weights, the order of images and the mixing of tokens."""
    workers: int = 0
    """Processes per process that decode images ahead; 0 decodes when needed. Does not change results."""
    cache: str = ""
    """Folder for activations in float16, made once and read by every later run; '' computes them anew."""

    def __post_init__(self):
        choose(self, "tokens", Tokens)
        for name in ("images", "chunk_images", "lanes", "image_batch", "token_batch"):
            if not getattr(self, name) > 0:
                raise PatchSAEError(f"{name}={getattr(self, name)} must be positive.")
        for name in ("workers", "seed"):
            if getattr(self, name) < 0:
                raise PatchSAEError(f"{name}={getattr(self, name)} must be 0 or more.")
        if self.token_batch < self.lanes:
            raise PatchSAEError(
                f"token_batch={self.token_batch} is less than lanes={self.lanes}; "
                f"every batch takes at least one token from each lane."
            )


class Position(NamedTuple):
    """Where the stream goes on."""

    chunk: int = 0
    batch: int = 0
    """Batches of the chunk already handed out."""


class TokenBatch(NamedTuple):
    """One optimiser step's tokens, those of this process's lanes."""

    x: Tensor  # [n, d] float32
    is_cls: Tensor  # [n] bool
    tokens: int
    """Tokens in the batches of all processes together."""
    position: Position
    """Where the stream goes on after this batch."""


class TokenStream:
    """Hand out an image set's tokens in optimiser batches.

    Raises
    ------
    PatchSAEError : the set is empty; the lanes cannot be split over the processes; as `Activations`.
    """

    def __init__(
        self,
        images: ImageSet,
        backbone: Backbone,
        config: StreamConfig,
        processes: Processes = Processes(),  # noqa: B008  (immutable)
        progress: bool = False,
    ):
        if len(images) == 0:
            raise PatchSAEError(f"image set '{images.name}' is empty; nothing to train on.")
        if config.lanes % processes.world:
            raise PatchSAEError(
                f"lanes={config.lanes} cannot be dealt evenly to {processes.world} processes; "
                f"start as many as divide {config.lanes}."
            )
        self.images, self.config = images, config
        self.activations = Activations(
            images, backbone, config.tokens, cache=Path(config.cache) if config.cache else "",
            image_batch=config.image_batch, workers=config.workers, processes=processes, progress=progress,
        )  # fmt: skip
        self.lanes = range(processes.rank, config.lanes, processes.world)
        self.device = backbone.device
        kind = torch.from_numpy(backbone.token_kind == "cls")[self.activations.columns]
        self._is_cls = kind.to(self.device)  # [T]

    @property
    def chunks(self) -> int:
        return math.ceil(self.config.images / self.config.chunk_images)

    def check_readable(self) -> None:
        """Find out whether every image of the stream can be decoded; raises PatchSAEError if not.

        What a cache holds was decoded already.
        """
        if not self.config.cache:
            needed = image_order(
                len(self.images), self.config.seed, 0, min(self.config.images, len(self.images))
            )
            self.images.check_readable(np.sort(needed))

    def first(self, images: int) -> Tensor:
        """Return the tokens [I, T, d] of the stream's first images, each image once (all, if fewer)."""
        n = min(images, self.config.images, len(self.images))
        order = image_order(len(self.images), self.config.seed, 0, n)
        size = self.config.image_batch
        plan = [order[start : start + size] for start in range(0, n, size)]
        return torch.cat(list(self.activations.read(plan)))

    def batches(self, start: Position = Position()) -> Iterator[TokenBatch]:  # noqa: B008
        """Yield the batches from `start` to the end of the stream."""
        per_lane = -(-self.config.chunk_images // self.config.lanes)
        ahead = len(self.lanes) * -(-per_lane // self.config.image_batch)  # a chunk, while one is learned
        read = self.activations.read(self._plan(start.chunk), ahead)
        for chunk in range(start.chunk, self.chunks):
            yield from self._chunk(chunk, start.batch if chunk == start.chunk else 0, read)

    def _lane_images(self, chunk: int) -> list[np.ndarray]:
        """Which images each lane has in a chunk: `lanes` arrays of indices."""
        begin = chunk * self.config.chunk_images
        end = min(begin + self.config.chunk_images, self.config.images)
        order = image_order(len(self.images), self.config.seed, begin, end)
        return [order[lane :: self.config.lanes] for lane in range(self.config.lanes)]

    def _plan(self, chunk: int) -> Iterator[np.ndarray]:
        """Yield the batches of images that this process's lanes need, from `chunk` on."""
        for number in range(chunk, self.chunks):
            images = self._lane_images(number)
            for lane in self.lanes:
                yield from self._cut(images[lane])

    def _cut(self, images: np.ndarray) -> list[np.ndarray]:
        # by lane, so that an image meets the same others in the backbone however many processes there are
        size = self.config.image_batch
        return [images[start : start + size] for start in range(0, len(images), size)]

    def _chunk(self, chunk: int, skip: int, read: Iterator[Tensor]) -> Iterator[TokenBatch]:
        images = self._lane_images(chunk)
        counts, shares = np.array([len(lane) for lane in images]) * self.activations.tokens, self._shares()
        steps = int(np.ceil(counts / shares).max())
        mixed = {lane: self._mix(chunk, lane, images[lane], read) for lane in self.lanes if counts[lane]}
        for step in range(skip, steps):
            parts = [
                [tensor[step * shares[lane] : (step + 1) * shares[lane]] for tensor in tokens]
                for lane, tokens in mixed.items()
            ]
            x, is_cls = (torch.cat(part) for part in zip(*parts, strict=True)) if parts else self._nothing()
            total = int(np.clip(counts - step * shares, 0, shares).sum())
            after = Position(chunk, step + 1) if step + 1 < steps else Position(chunk + 1)
            yield TokenBatch(x, is_cls, total, after)

    def _shares(self) -> np.ndarray:
        """Return how many tokens of a batch each lane gives."""
        # the first lanes take one token more where token_batch is no multiple of lanes
        shares = np.full(self.config.lanes, self.config.token_batch // self.config.lanes)
        shares[: self.config.token_batch % self.config.lanes] += 1
        return shares

    def images_at(self, position: Position) -> np.ndarray:
        """Return the image that each token comes from of this process's part of a batch: indices [n]."""
        images, shares, found = self._lane_images(position.chunk), self._shares(), [np.zeros(0, np.int64)]
        for lane in self.lanes:
            mixed = self._order(position.chunk, lane, len(images[lane]) * self.activations.tokens)
            part = mixed[position.batch * shares[lane] : (position.batch + 1) * shares[lane]]
            found.append(images[lane][part // self.activations.tokens])
        return np.concatenate(found)

    def _order(self, chunk: int, lane: int, tokens: int) -> np.ndarray:
        return np.random.default_rng([self.config.seed, chunk, lane]).permutation(tokens)

    def _mix(
        self, chunk: int, lane: int, images: np.ndarray, read: Iterator[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Return a lane's tokens x [n, d] and is_cls [n] in mixed order."""
        x = torch.cat([next(read) for _ in self._cut(images)]).flatten(0, 1)
        mixed = torch.from_numpy(self._order(chunk, lane, len(x))).to(self.device)
        return x[mixed], self._is_cls[mixed % len(self._is_cls)]

    def _nothing(self) -> tuple[Tensor, Tensor]:
        width = self.activations.backbone.d_model
        return torch.empty(0, width, device=self.device), self._is_cls[:0]


def image_order(length: int, seed: int, start: int, stop: int) -> np.ndarray:
    """Return which images come as number start … stop-1: every epoch in an order of its own."""
    numbers = np.arange(start, stop)
    order = np.empty(len(numbers), np.int64)
    for epoch in np.unique(numbers // length):
        here = numbers // length == epoch
        order[here] = _epoch_order(length, seed, int(epoch))[numbers[here] % length]
    return order


@lru_cache(maxsize=2)
def _epoch_order(length: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(length)
