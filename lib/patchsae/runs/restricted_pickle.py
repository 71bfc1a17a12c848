"""Other people's `.pt` files, read without running anything that is in them.

torch's own weights-only unpickler does the reading: it builds tensors, containers and numbers, and calls
nothing outside its list of rebuilding functions. It refuses a file as soon as a class is named that it
does not know, and published checkpoints name the class of their configuration. Here every unknown name
is resolved to a stand-in that can hold values and be called for nothing, so the list of what can run does
not grow.
"""

from __future__ import annotations

import re
import warnings
import zipfile
from collections.abc import Callable, Mapping
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from patchsae.runs.errors import PatchSAEError


class StandIn:
    """Hold the fields of an object whose class is not loaded; `vars` lists them."""

    stands_for = "?"

    def __new__(cls, *args):
        # How a pickle makes an object before it gives it fields; the arguments belong to the real class.
        return super().__new__(cls)

    def __init__(self, *args, **kwargs):
        # Objects made as above never get here: only a call of the name does.
        raise ForbiddenCall(self.stands_for)

    def __setstate__(self, state):
        if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
            raise ForbiddenCall(f"{self.stands_for}.__setstate__")
        self.__dict__.update(state)


class _Dtype(StandIn):
    """What stands for a numpy dtype: its code and byte order."""

    def __init__(self, code: object = "", *args: object):
        self.code, self.order = code, ""

    def __setstate__(self, state: object):
        if isinstance(state, tuple) and len(state) > 1:
            self.order = state[1]


class _Array(StandIn):
    """What stands for a numpy array beside the weights, such as a curve; its values are dropped."""

    def __init__(self):
        pass

    def __setstate__(self, state: object):
        pass


def _array(*_: object) -> _Array:
    return _Array()


def _number(dtype: object, raw: object = b"") -> object:
    """Make a Python number of a numpy scalar; what is none is dropped."""
    code = f"{dtype.order}{dtype.code}" if isinstance(dtype, _Dtype) else ""
    plain = re.fullmatch(r"[<>|=]?[biuf]([1248])", code)
    if not plain or not isinstance(raw, bytes) or len(raw) != int(plain[1]):
        return _Array()
    return np.frombuffer(raw, code)[0].item()


def _path(*parts: object) -> str:
    return "/".join(map(str, parts))


# what trainings write beside the weights, made by a call; each becomes a plain value or nothing
PLAIN = {
    "numpy.dtype": _Dtype,
    "numpy.ndarray": _Array,
    **{f"numpy.{core}.multiarray._reconstruct": _array for core in ("core", "_core")},
    **{f"numpy.{core}.multiarray.scalar": _number for core in ("core", "_core")},
    **{
        f"pathlib{module}.{name}": _path
        for module in ("", "._local")
        for name in ("Path", "PosixPath", "WindowsPath", "PurePath", "PurePosixPath", "PureWindowsPath")
    },
}


class ForbiddenCall(Exception):
    """Name what a file wanted to call."""


def read_pickle(path: Path, start: int = 0) -> object:
    """Read what `torch.save` wrote into a file, tensors on the CPU, unknown objects as `StandIn`.

    `start` is the first byte of the saved object, for files with a header before it.

    Raises
    ------
    PatchSAEError : the file is damaged, was not written by `torch.save`, or would call something on
        loading; in each case nothing of it has been run.
    """
    try:
        data = path.read_bytes()[start:] if start else None
        stand_ins = [_stand_in(name) for name in _unknown_names(_source(path, data))]
        with safe_globals(stand_ins), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a file that is refused is refused in one sentence
            return torch.load(_source(path, data), map_location="cpu", weights_only=True)
    except ForbiddenCall as call:
        raise PatchSAEError(
            f"{path} would call {call} when loaded, so it was not loaded: get it from a source you trust, "
            "as safetensors or as a plain state dict."
        ) from None
    except Exception as error:  # zip, pickle and tensor readers each have their own for a damaged file
        raise PatchSAEError(
            f"{path} is not a checkpoint that can be read safely ({_reason(error)}): fetch it again, or "
            "save its state dict anew with torch.save."
        ) from error


def plain_names(state: Mapping[str, object]) -> dict[str, object]:
    """Remove what wrappers put before the names of weights: data-parallel, torch.compile, Lightning."""
    names = [str(name).replace("_orig_mod.", "") for name in state]
    for _ in range(4):
        for prefix in ("module.", "model."):
            if names and all(name.startswith(prefix) for name in names):
                names = [name.removeprefix(prefix) for name in names]
    return dict(zip(names if len(set(names)) == len(names) else state, state.values(), strict=True))


def _source(path: Path, data: bytes | None) -> Path | BytesIO:
    return path if data is None else BytesIO(data)


def _unknown_names(source: Path | BytesIO) -> list[str]:
    archive = zipfile.is_zipfile(source)
    if isinstance(source, BytesIO):
        source.seek(0)
    # Files older than torch 1.6 are no archives; those that hold only tensors need no stand-ins.
    return get_unsafe_globals_in_checkpoint(source) if archive else []


def _plain_dict(*_: object) -> dict:
    """Stand in for a defaultdict: its factory is dropped, for torch fills no dictionary but a plain one."""
    return {}


def _stand_in(name: str) -> tuple[Callable, str]:
    if name.partition(".")[0] in ("os", "posix", "nt", "sys"):  # no class of a configuration lives there
        raise ForbiddenCall(name)
    if name in PLAIN:
        return PLAIN[name], name
    if name == "collections.defaultdict":  # in files that hold an optimizer; made by a call
        return _plain_dict, name
    return type("StandIn", (StandIn,), {"stands_for": name}), name


def _reason(error: Exception) -> str:
    # torch puts the cause on the last line but one, after advice to load the file unsafely.
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    lines = [line for line in lines if "weights_only" not in line and "Check the documentation" not in line]
    first = lines[-1].partition(". ")[0][:160].rstrip(" .:") if lines else ""
    return f"{type(error).__name__}: {first}" if first else type(error).__name__
