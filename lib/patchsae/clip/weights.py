"""Weights of a model from a file, whoever wrote it; nothing is unpickled that could run code."""

import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from patchsae.runs.errors import PatchSAEError, brief
from patchsae.runs.restricted_pickle import plain_names, read_pickle


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read named weights from safetensors, a plain state dict, or OpenAI's TorchScript archive.

    Raises
    ------
    PatchSAEError : the file is damaged, or could run code when it is read.
    """
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive, warnings.catch_warnings():
                if any(entry.endswith("/constants.pkl") for entry in archive.namelist()):
                    # TorchScript, which torch.load(weights_only) refuses
                    warnings.simplefilter("ignore")
                    return dict(torch.jit.load(str(path), map_location="cpu").state_dict())
        state = load_file(path) if path.suffix == ".safetensors" else _state_dict(read_pickle(path))
        return plain_names({key: value for key, value in state.items() if isinstance(value, Tensor)})
    except Exception as error:  # each format has its own errors for a damaged or foreign file
        why = brief(error)
        if isinstance(error, PatchSAEError):
            why = str(error).removeprefix(f"{path} ").partition(":")[0]
        raise PatchSAEError(
            f"{path} holds no weights that can be read safely ({why}): give "
            "safetensors, a plain state dict or OpenAI's TorchScript archive."
        ) from error


def warn_of_random_weights(name: str) -> None:
    """Warn that a model was asked for without weights, at the line that asked for it."""
    warnings.warn(
        f"{name} has random weights, so that nothing it says means anything: give "
        "pretrained=<tag or file> (`--pretrained`) for real ones.",
        stacklevel=4,
    )


def _state_dict(content: object) -> Mapping[str, object]:
    """Find the weights in what a training saved, which has them under one of these names or bare."""
    for name in ("state_dict", "model_state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(name), Mapping):
            return content[name]
    if not isinstance(content, Mapping):
        raise PatchSAEError(f"it holds a {type(content).__name__}, no named weights")
    return content
