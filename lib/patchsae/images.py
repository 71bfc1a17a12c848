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
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from .errors import PatchSAEError
from .progress import progress_bar

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".tif", ".tiff"}


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

    def batches(
        self,
        batch_size: int,
        indices: Sequence[int] | None = None,
        progress: str | None = None,
    ) -> Iterator[Batch]:
        """Iterate over the set (or `indices`) in order; `progress` names a tqdm bar."""
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

    def fingerprint(self) -> str:
        relabel = sorted((self.relabel or {}).items())
        return short_hash([self.parent.fingerprint(), self.indices.tolist(), relabel])


class FolderImages(ImageSet):
    """One folder per class (torchvision's ImageFolder layout), decoded on demand.

    Images are resized (bicubic, shorter side) and centre-cropped to `image_size` as CLIP's own
    preprocessing does (facts.md §1.2).

    Parameters
    ----------
    classnames : one per folder in sorted order, where folders are named by ids such as n01440764

    Raises
    ------
    PatchSAEError : the folder is missing or holds no image; a file cannot be decoded.
    """

    def __init__(
        self,
        root: str | Path,
        image_size: int,
        split: str = "test",
        classnames: Sequence[str] | None = None,
    ):
        self.root, self.image_size = Path(root), image_size
        if not self.root.is_dir():
            raise PatchSAEError(
                f"image folder '{root}' does not exist; give a folder with one sub-folder per class."
            )
        folders = sorted(p for p in self.root.iterdir() if p.is_dir())
        files = [
            (path, label)
            for label, folder in enumerate(folders)
            for path in sorted(folder.rglob("*"))
            if path.suffix.lower() in IMAGE_SUFFIXES
        ]
        if not files:
            raise PatchSAEError(
                f"no images under '{root}': expected {root}/<class name>/*.jpg (or png, webp, ...)."
            )
        self.name, self.split = self.root.name, split
        if classnames is not None and len(classnames) != len(folders):
            raise PatchSAEError(
                f"'{root}' has {len(folders)} class folders but {len(classnames)} class names were "
                f"given; complete the folder."
            )
        self.classnames = tuple(classnames or (folder.name.replace("_", " ") for folder in folders))
        self.paths = [path for path, _ in files]
        self.labels = np.array([label for _, label in files], dtype=np.int64)

    def load(self, indices: Sequence[int]) -> Batch:
        indices = np.asarray(indices, dtype=np.int64)
        images = torch.stack([load_image(self.paths[i], self.image_size) for i in indices])
        return Batch(images, torch.from_numpy(self.labels[indices]), torch.from_numpy(indices))

    def fingerprint(self) -> str:
        # size and time of change stand for the content: ImageNet's cannot be read at every start
        status = [(path.relative_to(self.root).as_posix(), path.stat()) for path in self.paths]
        files = [(name, found.st_size, found.st_mtime_ns) for name, found in status]
        return short_hash([self.image_size, files])


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

    def base(self) -> Dataset:
        """Keep the first ceil(n/2) classes (facts.md §2)."""
        return self._half(range(math.ceil(len(self.classnames) / 2)), "base")

    def novel(self) -> Dataset:
        """Keep the classes after the first ceil(n/2), relabelled from 0 (facts.md §2)."""
        n = len(self.classnames)
        return self._half(range(math.ceil(n / 2), n), "novel")

    def _half(self, keep: range, half: str) -> Dataset:
        return replace(
            self,
            name=f"{self.name}/{half}",
            title=f"{self.title} ({half})",
            classnames=tuple(self.classnames[i] for i in keep),
            train=self.train.classes(keep),
            test=self.test.classes(keep),
        )


def load_image(path: str | Path, image_size: int) -> torch.Tensor:
    """Decode one file to uint8 [3, S, S]: RGB, shorter side to S (bicubic), centre crop.

    Raises
    ------
    PatchSAEError : the file is missing or is no readable image.
    """
    try:
        with Image.open(path) as file:
            image = file.convert("RGB")
    except Exception as error:  # Pillow's decoders raise errors of many kinds on damaged files
        raise PatchSAEError(f"cannot read image '{path}' ({error}); replace or remove the file.") from error
    # the longer side is rounded down, as torchvision's Resize does
    width, height = (side * image_size // min(image.size) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = round((width - image_size) / 2), round((height - image_size) / 2)
    image = image.crop((left, top, left + image_size, top + image_size))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def short_hash(content: object) -> str:
    """Hash a JSON-able object to 16 hex digits, the same in every process."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
