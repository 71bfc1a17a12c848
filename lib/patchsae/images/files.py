"""Image sets on disk: files of any size, framed as a model takes them."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from patchsae.images.contents import check_decodable, content_digests
from patchsae.images.reading import SUFFIXES, read_image
from patchsae.images.reading import VERSION as READING
from patchsae.images.sets import Batch, ImageSet
from patchsae.runs.errors import PatchSAEError, printable

RESIZE = {
    "shortest": "resized and cropped to",
    "longest": "resized and padded to",
    "squash": "resized, in both directions, to",
}
INTERPOLATION = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "lanczos": Image.Resampling.LANCZOS,
}
# what systems and archive programs put beside a person's folders; any name is compared in lower case
NO_CLASSES = {
    *("__macosx", "__pycache__", "lost+found", "system volume information"),
    *("@eadir", "#recycle", "@recycle", "@recently-snapshot", "#snapshot", "$recycle.bin", "recycler"),
}


class Frame(NamedTuple):
    """How a picture becomes the square that a model takes; the defaults are CLIP's."""

    size: int
    """Side, px."""
    resize: str = "shortest"
    """Which side is resized to it: 'shortest' (then cropped), 'longest' (then padded), both ('squash')."""
    interpolation: str = "bicubic"
    """'bicubic', 'bilinear' or 'lanczos'."""
    fill: int = 0
    """Grey level of padding, 0 … 255."""
    kept: float = 1.0
    """Share of the resized side that is cropped to, as timm's `crop_pct`; not with padding."""

    @property
    def done(self) -> str:
        return RESIZE[self.resize]


def as_frame(frame: int | Frame) -> Frame:
    """Return a frame; a number is the side of CLIP's.

    Raises
    ------
    PatchSAEError : an unknown way of resizing or interpolation, or a share that is none.
    """
    frame = frame if isinstance(frame, Frame) else Frame(int(frame))
    for field, known in (("resize", RESIZE), ("interpolation", INTERPOLATION)):
        if getattr(frame, field) not in known:
            raise PatchSAEError(
                f"{field}={getattr(frame, field)!r} of the model's preprocessing is unknown; use one of "
                f"{', '.join(known)}."
            )
    if not 0 < frame.kept <= 1:
        raise PatchSAEError(f"kept={frame.kept!r} of the model's preprocessing must be above 0, up to 1.")
    return frame


class PathList(Sequence):
    """Files under one folder, held as a block of bytes; each becomes a Path only when asked for.

    ImageNet's 1.28 million names take 46 MB so, and reach a worker process in 0.1 s. Slices are lists.
    """

    def __init__(self, root: str | Path, names: Iterable[str]):
        encoded = [os.fsencode(name) for name in names]
        self.root, self._bytes = Path(root), b"".join(encoded)
        self._ends = np.cumsum([0, *map(len, encoded)])

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int | slice) -> Path | list[Path]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return self.root / self.name(index)

    def name(self, index: int) -> str:
        """Return one path relative to the folder, its parts joined by '/'."""
        index = range(len(self))[index]  # counts from the end, or raises IndexError, as a list does
        return os.fsdecode(self._bytes[self._ends[index] : self._ends[index + 1]])


class FileImages(ImageSet):
    """Files under one folder with a label each, decoded on demand.

    Images are resized, and cropped or padded, as the model's own preprocessing does (facts.md §1.2).

    Parameters
    ----------
    names : paths relative to `root`, with '/', one per label
    frame : the model's (`Backbone.frame`), or the side of CLIP's, px

    Raises
    ------
    PatchSAEError : a file is missing when it is needed, or cannot be decoded.
    """

    def __init__(
        self,
        root: str | Path,
        names: Iterable[str],
        labels: Sequence[int],
        classnames: Sequence[str],
        frame: int | Frame,
        name: str,
        split: str,
    ):
        self.paths, self.frame = PathList(root, names), as_frame(frame)
        self.labels = np.asarray(labels, dtype=np.int64)
        self.name, self.split, self.classnames = name, split, tuple(classnames)
        self._fingerprint: str | None = None

    @property
    def root(self) -> Path:
        return self.paths.root

    @property
    def image_size(self) -> int:
        return self.frame.size

    def load(self, indices: Sequence[int]) -> Batch:
        indices = np.asarray(indices, dtype=np.int64)
        images = torch.stack([load_image(self.paths[i], self.frame) for i in indices])
        return Batch(images, torch.from_numpy(self.labels[indices]), torch.from_numpy(indices))

    def picture(self, index: int) -> Image.Image:
        return open_image(self.paths[index])

    def key(self, index: int) -> str:
        return self.paths.name(index)

    def fingerprint(self) -> str:
        # Kept, because asking for size and time of 1.28 million files takes seconds.
        if self._fingerprint is None:
            content = hashlib.sha256(json.dumps([frame_key(self.frame), len(self), READING]).encode())
            content.update(self.labels.tobytes())
            names = [self.paths.name(index) for index in range(len(self))]
            for name, held in zip(names, content_digests(self.root, names), strict=True):
                content.update(os.fsencode(name) + b"\0" + held)
            self._fingerprint = content.hexdigest()[:16]
        return self._fingerprint

    def check_readable(self, indices: Sequence[int]) -> None:
        names = [self.paths.name(int(index)) for index in indices]
        check_decodable(self.root, names, self.name)


class FolderImages(FileImages):
    """One folder per class (torchvision's ImageFolder layout), decoded on demand as FileImages are.

    Class folders and files are taken in sorted order; hidden ones, and what a system puts beside a person's
    folders (`__MACOSX`, `@eaDir`), are left out.

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
        frame: int | Frame,
        split: str = "test",
        classnames: Sequence[str] | None = None,
    ):
        root = Path(root)
        if not root.is_dir():
            raise PatchSAEError(
                f"image folder '{root}' does not exist; give a folder with one sub-folder per class."
            )
        folders = class_folders(root)
        names, labels = files_by_class(root, folders)
        if not names:
            raise PatchSAEError(
                f"no images under '{root}': put jpg, png, webp, … files there, one folder per class."
            )
        if classnames is not None and len(classnames) != len(folders):
            raise PatchSAEError(
                f"'{root}' has {len(folders)} class folders but {len(classnames)} class names were "
                f"given; complete the folder."
            )
        classnames = classnames or [printable(folder).replace("_", " ") for folder in folders]
        super().__init__(root, names, labels, classnames, frame, printable(root.name), split)


def class_folders(root: Path) -> list[str]:
    """List the names of the sub-folders of `root` that a person made, sorted."""
    with os.scandir(root) as entries:
        return sorted(entry.name for entry in entries if _wanted(entry.name) and entry.is_dir())


def files_in(folder: Path) -> list[str]:
    """List the names of the images that lie in a folder itself, sorted, hidden ones left out."""
    with os.scandir(folder) as entries:
        names = sorted(entry.name for entry in entries if _wanted(entry.name) and entry.is_file())
    return [name for name in names if is_image(name)]


def is_image(name: str) -> bool:
    """Tell by its name whether a file is an image."""
    return os.path.splitext(name)[1].lower() in SUFFIXES


def _wanted(name: str) -> bool:
    return name[0] != "." and name.lower() not in NO_CLASSES


def files_by_class(root: Path, folders: Sequence[str]) -> tuple[list[str], np.ndarray]:
    """List the images of each folder, sorted, as paths relative to `root`; the label is its position."""
    found = [_images_in(root, folder) for folder in folders]
    labels = np.repeat(np.arange(len(folders)), [len(names) for names in found])
    return [name for names in found for name in names], labels


def _images_in(root: Path, folder: str) -> list[str]:
    with os.scandir(root / folder) as entries:
        entries = sorted((entry for entry in entries if _wanted(entry.name)), key=lambda entry: entry.name)
    names: list[str] = []
    for entry in entries:
        if entry.is_dir():
            if not entry.is_symlink():  # a link may lead back up
                names += _images_in(root, f"{folder}/{entry.name}")
        elif is_image(entry.name):
            names.append(f"{folder}/{entry.name}")
    return names


def load_image(path: str | Path, frame: int | Frame) -> torch.Tensor:
    """Decode one file to uint8 [3, S, S] in RGB, framed as the model frames it.

    Raises
    ------
    PatchSAEError : as `open_image`.
    """
    return resize_and_crop(open_image(path), frame)


def open_image(path: str | Path) -> Image.Image:
    """Decode one file in RGB at its own size.

    Raises
    ------
    PatchSAEError : the file is missing or is no readable image; it is too large, or a strip (`read_image`).
    """
    return read_image(path, f"image '{path}'")


def resize_and_crop(image: Image.Image, frame: int | Frame) -> torch.Tensor:
    """Turn an RGB image into uint8 [3, S, S] as open_clip's or timm's transform does, to the last bit.

    Raises
    ------
    PatchSAEError : an unknown way of resizing or interpolation.
    """
    size, resize, interpolation, fill, kept = as_frame(frame)
    (width, height), short, long = image.size, min(image.size), max(image.size)
    target = math.floor(size / kept)
    if resize == "squash":
        width = height = target
    elif resize == "longest":
        width, height = (max(1, round(side / (long / size))) for side in (width, height))
    else:  # the longer side is rounded down, as torchvision's Resize does
        width, height = (side * target // short for side in (width, height))
    image = image.resize((width, height), INTERPOLATION[interpolation])
    if resize == "longest":
        page = Image.new("RGB", (size, size), (fill,) * 3)
        page.paste(image, ((size - width) // 2, (size - height) // 2))
        image = page
    left, top = (round((side - size) / 2) for side in image.size)
    image = image.crop((left, top, left + size, top + size))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def frame_key(frame: Frame) -> int | list:
    """Return what a hash of images knows of their frame: of CLIP's own the side alone."""
    if frame == Frame(frame.size):
        return frame.size
    return list(frame if frame.kept != 1 else frame[:-1])  # sets that were hashed before keep their names
