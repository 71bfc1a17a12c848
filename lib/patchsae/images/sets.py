"""Image sets: what every later stage reads images from.

An image set yields uint8 images lazily, in the order asked for, and never holds more than one batch
of decoded images. The same interface serves the embedded pictogram scenes and folders on disk.
"""

from __future__ import annotations

import hashlib
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from patchsae.runs.checks import check_counts
from patchsae.runs.errors import PatchSAEError
from patchsae.runs.progress import progress_bar


class Batch(NamedTuple):
    """Some images of a set, in the order they were asked for."""

    images: torch.Tensor  # [B, 3, H, W] uint8, RGB
    labels: torch.Tensor  # [B] int64, index into classnames
    indices: torch.Tensor  # [B] int64, index into the image set


class ImageSet(ABC):
    """Yield (image, label, index) lazily.

    Attributes
    ----------
    name, split : str
    classnames : tuple[str, ...]; label i is classnames[i]
    labels : int64 [N], known without decoding an image
    """

    name: str
    split: str
    classnames: tuple[str, ...]
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def load(self, indices: Sequence[int]) -> Batch:
        """Decode the images at `indices` [B] into one batch."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Return a hash of everything that decides what the set contains."""

    def picture(self, index: int) -> Image.Image:
        """Return one image in RGB before any resizing; a set that has no other gives the loaded one."""
        pixels = self.load([index]).images[0].permute(1, 2, 0)
        return Image.fromarray(pixels.cpu().numpy())

    def key(self, index: int) -> str | int:
        """Name one image by what is the same on every machine: its relative path, or its index."""
        return int(index)

    def check_readable(self, indices: Sequence[int]) -> None:  # noqa: B027  (most sets need no check)
        """Find out, before long work depends on it, whether images can be decoded.

        Raises
        ------
        PatchSAEError : counts and names those that cannot.
        """

    def batches(
        self,
        batch_size: int,
        indices: Sequence[int] | None = None,
        progress: str | None = None,
    ) -> Iterator[Batch]:
        """Iterate over the set (or `indices`) in order; `progress` names a tqdm bar.

        Raises
        ------
        PatchSAEError : a batch size below 1, with which there would be no batch.
        """
        check_counts(batch_size=batch_size)
        order = np.arange(len(self)) if indices is None else np.asarray(indices)
        starts = range(0, len(order), batch_size)
        for start in progress_bar(starts, desc=progress, unit="batch", shown=progress is not None):
            yield self.load(order[start : start + batch_size])

    def subset(self, indices: Sequence[int], split: str | None = None) -> Subset:
        """Restrict the set to `indices`, keeping labels and class names."""
        return Subset(self, indices, split=split)

    def sample(self, n: int, seed: int = 0) -> Subset:
        """Restrict the set to n images drawn without replacement (all, if there are fewer)."""
        drawn = np.random.default_rng(seed).permutation(len(self))[:n]
        return Subset(self, np.sort(drawn))

    def per_class(self, n: int) -> Subset:
        """Restrict the set to the first n images of each class (all, where there are fewer)."""
        order = np.argsort(self.labels, kind="stable")
        first = np.searchsorted(self.labels[order], self.labels[order])
        return Subset(self, np.sort(order[np.arange(len(order)) - first < n]))

    def classes(self, keep: Sequence[int]) -> Subset:
        """Restrict the set to the classes `keep` and relabel them from 0 in that order."""
        relabel = {int(old): new for new, old in enumerate(keep)}
        indices = np.flatnonzero(np.isin(self.labels, list(relabel)))
        return Subset(self, indices, relabel=relabel)


class Subset(ImageSet):
    """Some images of another set, optionally with its classes relabelled."""

    def __init__(
        self,
        parent: ImageSet,
        indices: Sequence[int],
        relabel: dict[int, int] | None = None,
        split: str | None = None,
    ):
        self.parent, self.indices = parent, np.asarray(indices, dtype=np.int64)
        if len(self.indices) and not (0 <= self.indices.min() and self.indices.max() < len(parent)):
            raise PatchSAEError(
                f"subset indices of '{parent.name}' must lie in 0..{len(parent) - 1}; "
                f"got {self.indices.min()}..{self.indices.max()}."
            )
        self.relabel = relabel
        self.name, self.split = parent.name, split or parent.split
        labels = parent.labels[self.indices]
        if relabel is None:
            self.classnames, self.labels = parent.classnames, labels
        else:
            self.classnames = tuple(parent.classnames[old] for old in relabel)
            self.labels = np.array([relabel[int(label)] for label in labels], dtype=np.int64)

    def load(self, indices: Sequence[int]) -> Batch:
        indices = np.asarray(indices, dtype=np.int64)
        inner = self.parent.load(self.indices[indices])
        return Batch(inner.images, torch.from_numpy(self.labels[indices]), torch.from_numpy(indices))

    def picture(self, index: int) -> Image.Image:
        return self.parent.picture(self.indices[index])

    def key(self, index: int) -> str | int:
        return self.parent.key(self.indices[index])

    def check_readable(self, indices: Sequence[int]) -> None:
        self.parent.check_readable(self.indices[np.asarray(indices, dtype=np.int64)])

    def fingerprint(self) -> str:
        relabel = sorted((self.relabel or {}).items())
        return short_hash([self.parent.fingerprint(), self.indices.tolist(), relabel])


@dataclass(frozen=True)
class Dataset:
    """A classification benchmark: the interface of the paper's eleven and of the embedded eleven."""

    name: str
    """Identifier, as in `-p dataset eurosat`."""
    title: str
    """Name shown in figures."""
    classnames: tuple[str, ...]
    """One name per label, in label order."""
    template: str
    """Zero-shot prompt with one `{}` for the class name."""
    train: ImageSet
    """Images that statistics, masks and prompts may be computed from."""
    test: ImageSet
    """Images that accuracy is measured on; shares none with `train`."""
    val: ImageSet | None = None
    """Images to choose settings by, where the benchmark sets some apart; shares none with the others."""

    def base(self) -> Dataset:
        """Keep the first ceil(n/2) of the classes that `train` shows (facts.md §2).

        Raises
        ------
        PatchSAEError : a class of each half has the same name.
        """
        return self._half(self._halves()[0], "base")

    def novel(self) -> Dataset:
        """Keep the classes after those of `base`, relabelled from 0 (facts.md §2); raises as `base`."""
        return self._half(self._halves()[1], "novel")

    def _halves(self) -> tuple[list[int], list[int]]:
        # a benchmark made for testing only has nothing in train
        labels = np.unique(self.train.labels if len(self.train) else self.test.labels).tolist()
        middle = math.ceil(len(labels) / 2)
        base, novel = labels[:middle], labels[middle:]
        if shared := {self.classnames[i] for i in base} & {self.classnames[i] for i in novel}:
            raise PatchSAEError(
                f"base and novel classes of '{self.name}' overlap: '{min(shared)}' names one of each; give "
                f"the two classes different names, or one label."
            )
        return base, novel

    def _half(self, keep: list[int], half: str) -> Dataset:
        return replace(
            self,
            name=f"{self.name}/{half}",
            title=f"{self.title} ({half})",
            classnames=tuple(self.classnames[i] for i in keep),
            train=self.train.classes(keep),
            test=self.test.classes(keep),
            val=None if self.val is None else self.val.classes(keep),
        )


def short_hash(content: object) -> str:
    """Hash a JSON-able object to 16 hex digits, the same in every process."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
