"""CIFAR-100 in its official layout: three pickles, read without running anything that is in them.

The pixels stay in the file. Its pickle is read once, with stand-ins for the four names that an array
needs, to learn the labels and where in the file the pixels begin; from then on they are mapped.
"""

from __future__ import annotations

import hashlib
import io
import pickle
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from patchsae.images.files import Frame, as_frame, frame_key, resize_and_crop
from patchsae.images.sets import Batch, ImageSet, short_hash
from patchsae.runs.errors import PatchSAEError
from patchsae.runs.restricted_pickle import ForbiddenCall

SIDE = 32  # pixels, by the format
FILES = ("train", "test", "meta")


class CifarImages(ImageSet):
    """The train or test images of CIFAR-100, with their hundred fine labels.

    Parameters
    ----------
    folder : holds the files train, test and meta of cifar-100-python
    remedy : where to get them, a clause that ends every error

    Raises
    ------
    PatchSAEError : a file is missing, damaged, or would call something when read.
    """

    def __init__(self, folder: Path, frame: int | Frame, split: str, remedy: str):
        self.name, self.split, self.frame = "cifar-100", split, as_frame(frame)
        self.path = Path(folder) / split
        names = _field(_read(folder / "meta", remedy)[0], "fine_label_names", folder / "meta", remedy)
        if not all(isinstance(name, str | bytes) for name in names):
            raise PatchSAEError(f"'{folder / 'meta'}' holds names that are no text; {remedy}.")
        self.classnames = tuple(_text(name) for name in names)
        content, source = _read(self.path, remedy)
        labels = _field(content, "fine_labels", self.path, remedy)
        pixels = _field(content, "data", self.path, remedy).raw
        known = all(isinstance(y, int) and 0 <= y < len(self.classnames) for y in labels)
        if not known or not labels or type(pixels) is not bytes or len(pixels) != len(labels) * 3 * SIDE**2:
            raise PatchSAEError(
                f"'{self.path}' does not hold {SIDE}x{SIDE} images and their labels; {remedy}."
            )
        self.labels = np.array(labels, dtype=np.int64)
        offset = source.find(pixels[: 3 * SIDE**2])
        whole = offset >= 0 and source[offset : offset + len(pixels)] == pixels
        # a file pickled in protocol 2 by Python 3 holds them recoded, so they cannot be mapped
        self._offset = offset if whole else None
        self._pixels = None if whole else np.frombuffer(pixels, np.uint8).reshape(-1, 3, SIDE, SIDE)
        self._fingerprint: str | None = None

    @property
    def pixels(self) -> np.ndarray:
        """Return all images, uint8 [N, 3, 32, 32], as a view of the file."""
        if self._pixels is None:
            shape = len(self), 3, SIDE, SIDE
            self._pixels = np.memmap(self.path, np.uint8, "r", self._offset, shape)
        return self._pixels

    def __getstate__(self) -> dict[str, object]:
        # a worker process maps the file itself
        return self.__dict__ | ({} if self._offset is None else {"_pixels": None})

    def picture(self, index: int) -> Image.Image:
        return Image.fromarray(np.ascontiguousarray(self.pixels[index].transpose(1, 2, 0)))

    def key(self, index: int) -> str:
        return f"{self.split}/{index}"

    def load(self, indices: Sequence[int]) -> Batch:
        indices = np.asarray(indices, dtype=np.int64)
        images = torch.stack([resize_and_crop(self.picture(i), self.frame) for i in indices])
        return Batch(images, torch.from_numpy(self.labels[indices]), torch.from_numpy(indices))

    def fingerprint(self) -> str:
        if self._fingerprint is None:
            content = hashlib.sha256(self.labels.tobytes())
            content.update(self.pixels)
            self._fingerprint = short_hash([frame_key(self.frame), self.split, content.hexdigest()])
        return self._fingerprint


class _Array:
    """What stands for a numpy array while its pickle is read: its bytes."""

    raw = b""

    def __setstate__(self, state: tuple):
        self.raw = state[4]  # version, shape, dtype, order, bytes


class _Dtype:
    """What stands for a numpy dtype."""

    def __init__(self, *args: object):
        pass

    def __setstate__(self, state: object):
        pass


def _reconstruct(*args: object) -> _Array:
    return _Array()


def _frombuffer(buffer: bytes, *args: object) -> _Array:
    array = _Array()
    array.raw = bytes(buffer)
    return array


def _encode(text: str, encoding: str) -> bytes:
    return str(text).encode("latin1")


_STAND_INS = {
    "multiarray._reconstruct": _reconstruct,
    "numeric._frombuffer": _frombuffer,
    "numpy.ndarray": _Array,
    "numpy.dtype": _Dtype,
    "_codecs.encode": _encode,
}


class _Unpickler(pickle._Unpickler):
    """Python's own unpickler: that in C gives memory to whatever memo index twelve bytes may name."""

    def find_class(self, module: str, name: str) -> object:
        # numpy renamed its package between its first and second version
        full = f"{module}.{name}".removeprefix("numpy.core.").removeprefix("numpy._core.")
        if full not in _STAND_INS:
            raise ForbiddenCall(f"{module}.{name}")
        return _STAND_INS[full]


def _read(path: Path, remedy: str) -> tuple[dict, bytes]:
    try:
        source = path.read_bytes()
        if not source.endswith(pickle.STOP):  # cut off, perhaps within a name, which would be believed
            raise EOFError
        content = _Unpickler(io.BytesIO(source), encoding="bytes").load()
        # Python 2 wrote the names as bytes
        named = {_text(key): value for key, value in content.items()}
    except FileNotFoundError:
        raise PatchSAEError(f"'{path}' is missing; {remedy}.") from None
    except ForbiddenCall as call:
        raise PatchSAEError(f"'{path}' would call {call} when read, so it was not; {remedy}.") from None
    except Exception as error:  # a damaged pickle ends in errors of many kinds
        raise PatchSAEError(f"'{path}' is damaged ({type(error).__name__}); {remedy}.") from error
    return named, source


def _text(name: str | bytes) -> str:
    return name.decode() if isinstance(name, bytes) else name


def _field(content: dict, name: str, path: Path, remedy: str) -> object:
    if not isinstance(content.get(name), list if name != "data" else _Array):
        raise PatchSAEError(f"'{path}' holds no {name}; {remedy}.")
    return content[name]
