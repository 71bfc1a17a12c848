"""What a chapter computed, kept in `results`: a figure is drawn again without computing it anew.

What takes long in the engine is kept by the engine, under a version of its own. This is for what a chapter
makes of it in some seconds: kept until any code changes but that of figures. What takes a chapter minutes
has a version, too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import numpy as np

import patchsae
from patchsae.runs.errors import PatchSAEError
from patchsae.runs.stage import Stage, digest, tree_digests, write_atomic

T = TypeVar("T")
FORMAT = 1  # of the file itself
RESULT = "kept.msgpack"
DRAWN = "patchbook/figures/"


def keep(
    root: str | Path, name: str, kind: type[T], make: Callable[[], T], inputs: Mapping[str, Any],
    version: int | None = None,
) -> T:  # fmt: skip
    """Return what `make` returns, from `root` where it was made before from the same inputs and code.

    Parameters
    ----------
    kind : its type, of named tuples, mappings, sequences, numbers and arrays; what is read is held to it
    version : of the code, raised when the same inputs would give other numbers; None: a hash of all code
        but that of figures

    Raises
    ------
    PatchSAEError : what was kept is damaged; as `make`.
    TypeError : it returns something of another kind.
    """
    made_by = {"inputs": dict(inputs), "code": _code() if version is None else version}
    stage = Stage.open(root, name, made_by, version=FORMAT)
    path = stage.path / RESULT

    def write() -> None:
        packed = msgspec.msgpack.encode(make(), enc_hook=_pack)
        write_atomic(path, lambda temporary: temporary.write_bytes(packed))
        stage.finish(RESULT)

    stage.once(write)
    try:
        return msgspec.msgpack.decode(path.read_bytes(), type=kind, dec_hook=_unpack)
    except (OSError, msgspec.DecodeError, ValueError, TypeError) as error:
        raise PatchSAEError(
            f"'{path}' is damaged ({error}): delete {stage.path}, and run again."
        ) from error


@functools.cache
def _code() -> str:
    """Hash all code but that of figures, whatever of it was used."""
    found = {}
    for package in (Path(patchsae.__file__).parent, Path(__file__).parent):
        found |= tree_digests(package.parent, f"{package.name}/**/*.py")
    return digest({name: value for name, value in found.items() if not name.startswith(DRAWN)})


def _pack(value: object) -> object:
    if isinstance(value, np.ndarray):
        return [value.dtype.str, value.shape, np.ascontiguousarray(value).tobytes()]
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value).__name__} cannot be kept: give arrays, numbers or names.")


def _unpack(_: type, value: tuple[str, list[int], bytes]) -> np.ndarray:
    """Return an array; msgspec refuses it where another kind was to be read."""
    dtype, shape, raw = value
    return np.frombuffer(raw, np.dtype(dtype)).reshape(shape).copy()
