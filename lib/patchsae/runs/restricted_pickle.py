"""Other people's `.pt` files, read without running anything that is in them.

torch's own weights-only unpickler does the reading: it builds tensors, containers and numbers, and calls
nothing outside its list of rebuilding functions. It refuses a file as soon as a class is named that it
does not know, and published checkpoints name the class of their configuration. Here every unknown name
is resolved to a stand-in that can hold values and be called for nothing, so the list of what can run does
not grow.
"""

from __future__ import annotations

import warnings
import zipfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

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
    if name == "collections.defaultdict":  # in files that hold an optimizer; made by a call
        return _plain_dict, name
    return type("StandIn", (StandIn,), {"stands_for": name}), name


def _reason(error: Exception) -> str:
    # torch puts the cause on the last line but one, after advice to load the file unsafely.
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    lines = [line for line in lines if "weights_only" not in line and "Check the documentation" not in line]
    first = lines[-1].partition(". ")[0][:160].rstrip(" .:") if lines else ""
    return f"{type(error).__name__}: {first}" if first else type(error).__name__
