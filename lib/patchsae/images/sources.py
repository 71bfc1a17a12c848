"""Image sets that are no folder of files: tar shards, sets of torchvision, Hugging Face `datasets`.

open_source("shards/train-{000..012}.tar", frame)      WebDataset's layout, read in any order
open_source("torchvision:DTD:folder:train", frame)     a set that torchvision knows, already fetched
open_source("datasets:folder:train", frame)            saved by `datasets`, or organisation/name on the hub
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import tarfile
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from functools import cached_property, lru_cache
from glob import glob
from itertools import product
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from PIL import Image

from patchsae.images.files import Frame, as_frame, frame_key, is_image, resize_and_crop
from patchsae.images.reading import VERSION as READING
from patchsae.images.reading import read_image
from patchsae.images.sets import Batch, ImageSet, short_hash
from patchsae.runs.errors import PatchSAEError, brief

TORCHVISION, DATASETS = "torchvision:", "datasets:"
CLASSNAMES = "classnames.txt"
# Of torchvision's sets those that read pictures as they are: CIFAR's are pickles, which could run code.
KNOWN = (
    *("Caltech101", "Country211", "DTD", "EuroSAT", "FGVCAircraft", "Flowers102", "Food101", "GTSRB"),
    *("Imagenette", "OxfordIIITPet", "RenderedSST2", "STL10", "StanfordCars", "SUN397", "SVHN"),
)


class Pictures(ImageSet):
    """Images that a subclass gives one by one, as a picture of any size."""

    def __init__(
        self, frame: int | Frame, labels: Sequence[int], classnames: Sequence[str], name: str, split: str
    ):
        self.frame, self.labels = as_frame(frame), np.asarray(labels, np.int64)
        self.classnames, self.name, self.split = tuple(classnames), name, split

    @abstractmethod
    def picture(self, index: int) -> Image.Image:
        """Return one image in RGB before any resizing."""

    def load(self, indices: Sequence[int]) -> Batch:
        indices = np.asarray(indices, np.int64)
        images = torch.stack([resize_and_crop(self.picture(i), self.frame) for i in indices])
        return Batch(images, torch.from_numpy(self.labels[indices]), torch.from_numpy(indices))

    def fingerprint(self) -> str:
        labels = hashlib.sha256(self.labels.tobytes()).hexdigest()
        return short_hash([frame_key(self.frame), READING, self.split, labels, self._content])

    @property
    @abstractmethod
    def _content(self) -> object:
        """What tells these images from others, as JSON."""


def is_source(name: str) -> bool:
    """Tell whether a text names images that `open_source` opens, rather than a folder."""
    return name.startswith((TORCHVISION, DATASETS)) or name.endswith(".tar")


def open_source(source: str, frame: int | Frame) -> Pictures:
    """Open images by a text, as at the head of this file.

    Raises
    ------
    PatchSAEError : nothing is there; a package is missing; a set has no images, or reads them by pickles.
    """
    if source.startswith(TORCHVISION):
        kind, _, rest = source.removeprefix(TORCHVISION).partition(":")
        return TorchvisionImages(kind, *_folder_and_split(rest), frame)
    if source.startswith(DATASETS):
        return DatasetsImages(*_folder_and_split(source.removeprefix(DATASETS)), frame)
    return Shards(source, frame)


def _folder_and_split(text: str) -> tuple[str, str]:
    folder, _, split = text.rpartition(":")
    return (folder, split) if folder else (text, "train")


class Entry(NamedTuple):
    """Where one picture lies."""

    key: str
    shard: int
    start: int
    size: int


class Shards(Pictures):
    """Tar files in WebDataset's layout: `key.jpg` beside `key.cls`, which holds the label.

    Shards are listed once and read at any place afterwards, without unpacking. Names of classes are those
    of `classnames.txt` beside the shards; without labels all images are one class.

    Parameters
    ----------
    pattern : path with `{000..012}` or `*`
    """

    def __init__(self, pattern: str, frame: int | Frame, split: str = "all"):
        self.paths = [Path(path) for part in _braces(pattern) for path in sorted(glob(part))]
        if not self.paths:
            raise PatchSAEError(f"there is no shard '{pattern}'; correct the path.")
        entries, labels = [], {}
        for number, path in enumerate(self.paths):
            for entry, label in _listed(path, number):
                entries.append(entry)
                if label is not None:
                    labels[len(entries) - 1] = label
        if not entries:
            raise PatchSAEError(f"'{pattern}' holds no images; give shards that do.")
        if labels and len(labels) < len(entries):
            bare = next(n for n in range(len(entries)) if n not in labels)
            raise PatchSAEError(f"'{pattern}': {entries[bare].key} has no .cls, which others have; add it.")
        self.entries, folder = entries, self.paths[0].parent
        values = [labels.get(n, 0) for n in range(len(entries))]
        names = _class_names(folder / CLASSNAMES, values) if labels else (folder.resolve().name,)
        super().__init__(frame, values, names, folder.resolve().name, split)

    def picture(self, index: int) -> Image.Image:
        entry = self.entries[index]
        path = self.paths[entry.shard]
        try:
            file = _opened(path)
            content = os.pread(file.fileno(), entry.size, entry.start)
        except OSError as error:
            raise PatchSAEError(f"cannot read '{path}' ({error.strerror}); put it back.") from error
        return read_image(io.BytesIO(content), f"image '{entry.key}' of '{path}'")

    def key(self, index: int) -> str:
        return self.entries[index].key

    @cached_property
    def _content(self) -> list:
        stats = [path.stat() for path in self.paths]
        shards = [
            [path.name, found.st_size, found.st_mtime_ns]
            for path, found in zip(self.paths, stats, strict=True)
        ]
        return [shards, list(self.classnames)]


def _braces(pattern: str) -> list[str]:
    """Spell out {000..012} and {a,b} in a path."""
    pieces = re.split(r"(\{[^{}]*\})", str(Path(pattern).expanduser()))
    choices = []
    for piece in pieces:
        if span := re.fullmatch(r"\{(\d+)\.\.(\d+)\}", piece):
            first, last = span.groups()
            choices.append([f"{n:0{len(first)}d}" for n in range(int(first), int(last) + 1)])
        else:
            choices.append(piece[1:-1].split(",") if piece.startswith("{") else [piece])
    return ["".join(parts) for parts in product(*choices)]


def _listed(path: Path, number: int) -> Iterator[tuple[Entry, int | None]]:
    """List the pictures of one shard, with their labels where there are any."""
    pictures, labels = {}, {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if not member.isreg():
                    continue
                folder, _, file = member.name.rpartition("/")
                stem, _, ending = file.partition(".")  # WebDataset's rule: a key ends at its first dot
                key = f"{folder}/{stem}" if folder else stem
                if is_image(file):
                    pictures.setdefault(key, Entry(key, number, member.offset_data, member.size))
                elif ending == "cls":
                    labels[key] = int(tar.extractfile(member).read(32))
    except (OSError, tarfile.TarError, ValueError) as error:
        raise PatchSAEError(f"'{path}' is no readable shard ({brief(error)}); replace it.") from error
    for key, entry in pictures.items():
        yield entry, labels.get(key)


@lru_cache(maxsize=64)
def _opened(path: Path) -> BinaryIO:
    return open(path, "rb")  # noqa: SIM115  (kept for the next picture)


def _class_names(file: Path, labels: Sequence[int]) -> list[str]:
    if min(labels) < 0:
        raise PatchSAEError(f"a label beside '{file}' is {min(labels)}; labels count from 0.")
    if not file.is_file():
        return [str(number) for number in range(max(labels) + 1)]
    names = [line.strip() for line in file.read_text("utf-8").splitlines() if line.strip()]
    if len(names) <= max(labels):
        raise PatchSAEError(
            f"'{file}' has {len(names)} names, but there is a label {max(labels)}; complete it."
        )
    return names


class TorchvisionImages(Pictures):
    """A data set of torchvision that was fetched before, at its own sizes.

    Parameters
    ----------
    kind : name of its class, such as DTD
    """

    def __init__(self, kind: str, root: str, split: str, frame: int | Frame):
        from patchsae.runs import compat  # noqa: F401  (before torchvision)

        # isort: split
        from torchvision import datasets

        if kind not in KNOWN:
            raise PatchSAEError(
                f"'{kind}' is no data set that can be read safely; give one of {', '.join(KNOWN)}."
            )
        whole = kind in ("Caltech101", "EuroSAT", "SUN397")  # these have no split
        try:
            self.data = getattr(datasets, kind)(root, **({} if whole else {"split": split}))
        except (RuntimeError, ValueError, OSError) as error:
            raise PatchSAEError(
                f"torchvision finds no {kind} of split '{split}' in '{root}' ({brief(error)}); fetch it, "
                "or correct the two."
            ) from error
        labels = _torchvision_labels(self.data)
        names = getattr(self.data, "classes", None) or getattr(self.data, "categories", None)
        names = names or [str(number) for number in range(int(max(labels)) + 1)]
        names = [name if isinstance(name, str) else name[0] for name in names]
        super().__init__(frame, labels, names, kind.lower(), "all" if whole else split)
        self.root = Path(root)

    def picture(self, index: int) -> Image.Image:
        try:
            return self.data[int(index)][0].convert("RGB")
        except OSError as error:
            raise PatchSAEError(f"cannot read image {index} of '{self.name}' ({error}).") from error

    @cached_property
    def _content(self) -> list:
        found = hashlib.sha256()
        for folder, _, files in sorted(os.walk(self.root)):
            for file in sorted(files):
                stat = os.stat(os.path.join(folder, file))
                place = os.path.relpath(os.path.join(folder, file), self.root)
                found.update(os.fsencode(f"{place}\0{stat.st_size} {stat.st_mtime_ns}\n"))
        return [self.name, found.hexdigest()]


def _torchvision_labels(data: Any) -> list[int]:
    for name in ("_labels", "targets", "labels", "y"):
        if (labels := getattr(data, name, None)) is not None:
            return [int(label) for label in labels]
    return [int(label) for _, label in data._samples]


class DatasetsImages(Pictures):
    """A Hugging Face data set with a column of images, and one of class labels if there is any.

    Parameters
    ----------
    source : folder that `Dataset.save_to_disk` wrote, or organisation/name on the hub
    """

    def __init__(self, source: str, split: str, frame: int | Frame):
        try:
            import datasets
        except ImportError as error:
            raise PatchSAEError(
                f"'{DATASETS}{source}' needs the package datasets: run pip install 'patchsae[sets]'."
            ) from error
        try:
            if Path(source).expanduser().is_dir():
                data = datasets.load_from_disk(str(Path(source).expanduser()))
                data = data[split] if isinstance(data, datasets.DatasetDict) else data
            else:
                data = datasets.load_dataset(source, split=split)
        except Exception as error:  # a missing split, no network, a damaged file: each its own
            raise PatchSAEError(
                f"'{source}' of split '{split}' cannot be opened by datasets ({brief(error)}); "
                "correct the two."
            ) from error
        images = [name for name, kind in data.features.items() if isinstance(kind, datasets.Image)]
        classes = [name for name, kind in data.features.items() if isinstance(kind, datasets.ClassLabel)]
        if not images or not len(data):
            raise PatchSAEError(f"'{source}' has no images; give a data set with a column of them.")
        self.column = images[0]
        # undecoded, so that the one guarded reader decodes
        self.data = data.cast_column(self.column, datasets.Image(decode=False))
        name = source.rstrip("/").rpartition("/")[2]
        labels, names = [0] * len(data), [name]
        if classes:
            labels, names = data[classes[0]][:], data.features[classes[0]].names
        super().__init__(frame, labels, names, name, split)

    def picture(self, index: int) -> Image.Image:
        found = self.data[int(index)][self.column]
        if found is None:
            raise PatchSAEError(f"image {index} of '{self.name}' is missing; leave its row out.")
        source = io.BytesIO(found["bytes"]) if found["bytes"] is not None else found["path"]
        return read_image(source, f"image {index} of '{self.name}'")

    @property
    def _content(self) -> list:
        return [self.name, self.data._fingerprint]
