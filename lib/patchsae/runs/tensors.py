"""Tensors of a computation that is not finished, in files that tell when they are damaged."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from patchsae.runs.disk import write_atomic


def save_tensors(path: str | Path, tensors: Mapping[str, Tensor], facts: object = None) -> Path:
    """Write tensors and a JSON-able value to one safetensors file, atomically, with a hash of both."""
    tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    text = json.dumps(facts)
    meta = {"facts": text, "sha256": _digest(tensors, text)}
    return write_atomic(path, lambda temporary: save_file(tensors, temporary, meta))


def load_tensors(path: str | Path) -> tuple[dict[str, Tensor], Any]:
    """Read what `save_tensors` wrote: the tensors, on the CPU, and the value.

    Raises
    ------
    ValueError : the file is damaged, or of another kind.
    FileNotFoundError : there is none.
    """
    try:
        with safe_open(path, framework="pt") as file:
            meta = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise
    except (SafetensorError, OSError) as error:
        raise ValueError(str(error)) from error
    text = meta.get("facts", "")
    if meta.get("sha256") != _digest(tensors, text):
        raise ValueError("its content is not what its hash says")
    return tensors, json.loads(text)


def row_sums(x: Tensor) -> Tensor:
    """Return the CRC-32 of every row of a tensor [N, ...] on the CPU: int64 [N]."""
    rows = x.contiguous().view(torch.uint8).flatten(1).numpy()
    return torch.tensor([zlib.crc32(row) for row in rows], dtype=torch.int64)


def _digest(tensors: Mapping[str, Tensor], text: str) -> str:
    content = hashlib.sha256(text.encode())
    for name, value in sorted(tensors.items()):
        content.update(f"\0{name} {value.dtype} {tuple(value.shape)}\0".encode())
        content.update(value.reshape(-1).view(torch.uint8).numpy())
    return content.hexdigest()
