"""An autoencoder on disk: weights in safetensors beside its configuration in JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from patchsae.runs.checks import check_weights
from patchsae.runs.errors import PatchSAEError
from patchsae.runs.stage import write_atomic, write_json
from patchsae.sae.config import SAEConfig

WEIGHTS, CONFIG = "sae.safetensors", "sae.json"


def write_sae(folder: Path, config: SAEConfig, state: dict[str, Tensor]) -> None:
    """Write configuration and weights, each atomically."""
    weights = {name: w.cpu().contiguous() for name, w in state.items()}
    write_json(folder / CONFIG, asdict(config))
    write_atomic(folder / WEIGHTS, lambda temporary: save_file(weights, temporary))


def read_sae(folder: Path, device: str | torch.device) -> tuple[SAEConfig, dict[str, Tensor]]:
    """Read configuration and weights, which are finite and of the size that the former says.

    Raises
    ------
    PatchSAEError : a file is missing, damaged or of another format; a weight is not finite.
    """
    try:
        values = json.loads((folder / CONFIG).read_text("utf-8-sig"))
        weights = load_file(folder / WEIGHTS, device=str(device))
    except FileNotFoundError as error:
        raise PatchSAEError(
            f"'{error.filename or folder}' does not exist; train an SAE first "
            f"(notebook 01_training) or give the folder of one."
        ) from error
    except (OSError, ValueError, RecursionError, SafetensorError) as error:  # also of JSON and UTF-8
        raise PatchSAEError(
            f"'{folder}' holds no readable SAE ({error}); delete the folder and train it again."
        ) from error
    known = {field.name for field in fields(SAEConfig)}
    if not isinstance(values, dict) or set(values) != known:
        other = known ^ set(values) if isinstance(values, dict) else known
        raise PatchSAEError(
            f"'{folder / CONFIG}' has other fields than this version's: "
            f"{', '.join(sorted(other))}; train the SAE again."
        )
    try:
        config = SAEConfig(**values)
    except PatchSAEError as error:
        raise PatchSAEError(f"'{folder / CONFIG}' is damaged: {error}") from error
    there = tuple(weights["W_dec"].shape) if "W_dec" in weights else ()
    if there != (config.d_sae, config.d_in):  # before an SAE of that size takes the memory
        raise PatchSAEError(
            f"'{folder / CONFIG}' describes {config.d_sae} latents of width {config.d_in}, but "
            f"'{folder / WEIGHTS}' has W_dec of shape {list(there)}; train the SAE again."
        )
    check_weights(f"'{folder / WEIGHTS}'", weights)
    return config, weights
