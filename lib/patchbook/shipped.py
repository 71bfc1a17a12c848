"""Autoencoders that the repository ships: found by what they were trained from, checked, and loaded.

`artefacts/sae/index.json` says of each what it was trained from: its `training_digest`, which is
the same on every machine. Whoever asks for an SAE of these very inputs gets the artefact; any other, one on
another backbone too, is trained as if nothing were shipped.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file

from patchsae.clip.backbone import Backbone
from patchsae.images.sets import ImageSet
from patchsae.runs.artefacts import artefact
from patchsae.runs.errors import PatchSAEError
from patchsae.runs.stage import Stage, file_digest, jsonable, write_atomic, write_json
from patchsae.sae.model import CONFIG, SAE, WEIGHTS, SAEConfig
from patchsae.sae.sharing import CARD
from patchsae.training.trainer import (
    FILES,
    METRICS,
    VERSION,
    TrainConfig,
    Trained,
    read_metrics,
    train_sae,
    training_digest,
    training_inputs,
    write_metrics,
)  # fmt: skip

INDEX = "index.json"
REMEDY = "run 'make saes'"


class Shipped(NamedTuple):
    """One artefact, read and checked."""

    name: str
    sae: SAE
    """In float32, whatever is on disk."""
    metrics: list[dict[str, float]]
    """Rows of its training."""
    card: dict[str, object]
    """Recipe, inputs, measurements and licence."""


def shelf() -> Path:
    """Return the folder of the artefacts."""
    return artefact("sae")


def read_index(folder: Path | None = None) -> dict[str, dict[str, str]]:
    """Return what is shipped: name to {'inputs', 'sha256'}; nothing where there is no index.

    Raises
    ------
    PatchSAEError : the index is damaged.
    """
    path = (folder or shelf()) / INDEX
    try:
        found = json.loads(path.read_text("utf-8"))
        return {
            str(name): {key: str(entry[key]) for key in ("inputs", "sha256")}
            for name, entry in found.items()
        }
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise PatchSAEError(f"'{path}' is damaged ({error!r}); {REMEDY}, or take it from git.") from error


def load_shipped(
    name: str, folder: Path | None = None, device: str | torch.device = "cpu", d_in: int | None = None
) -> Shipped:
    """Read an artefact by name and check it; `d_in` is the width it has to have.

    Raises
    ------
    PatchSAEError : it is not in the index; a file of it is missing, damaged or of other inputs; it is of
        another width or shape, or has numbers that are not finite.
    """
    folder = folder or shelf()
    index = read_index(folder)
    if name not in index:
        raise PatchSAEError(
            f"'{folder / INDEX}' names no SAE '{name}', only {', '.join(index) or 'none'}; {REMEDY}."
        )
    here = folder / name
    for file in (WEIGHTS, CONFIG, METRICS, CARD):
        if not (here / file).is_file():
            raise PatchSAEError(f"'{here / file}' is missing; {REMEDY}, or take it from git.")
    if file_digest(here / WEIGHTS) != index[name]["sha256"]:
        raise PatchSAEError(f"'{here / WEIGHTS}' is damaged: its sha256 is not the index's; {REMEDY}.")
    try:
        sae, metrics = SAE.load(here, device), read_metrics(here)
        card = json.loads((here / CARD).read_text("utf-8"))
        recipe = card["inputs"], card["sae"]
    except (PatchSAEError, ValueError, KeyError, TypeError) as error:
        raise PatchSAEError(
            f"the shipped SAE in '{here}' is damaged ({str(error).rstrip('.')}); {REMEDY}."
        ) from error
    if recipe != (index[name]["inputs"], jsonable(asdict(sae.config))) or not metrics:
        raise PatchSAEError(f"'{here / CARD}' is not of the SAE in the index; {REMEDY}.")
    if d_in is not None and sae.d_in != d_in:
        raise PatchSAEError(f"'{here / WEIGHTS}' is of width {sae.d_in}, not {d_in}; {REMEDY}.")
    return Shipped(name, sae, metrics, card)


def shipped_name(inputs: str, folder: Path | None = None) -> str | None:
    """Return the name of the shipped SAE that was trained from these inputs (`training_digest`), if any."""
    index = read_index(folder or shelf())
    return next((name for name, entry in index.items() if entry["inputs"] == inputs), None)


def find_or_train(
    images: ImageSet,
    backbone: Backbone,
    sae_config: SAEConfig,
    config: TrainConfig,
    root: str | Path,
    progress: bool = True,
    folder: Path | None = None,
    expected: bool = False,
) -> Trained:
    """Return the shipped SAE of exactly these inputs, or else what `train_sae` returns.

    What is loaded is written under `root` like a result, in a folder named by inputs and weights, so that
    whatever is made from it is never taken for something made from an SAE trained here. With `expected`, a
    training that the shelf should have saved is announced by a warning.

    Raises
    ------
    PatchSAEError : as `load_shipped` and `train_sae`.
    """
    folder = folder or shelf()
    inputs = training_inputs(images, backbone, sae_config, config)
    name = shipped_name(training_digest(images, backbone, sae_config, config), folder)
    if name is None:
        if expected and not Stage.open(root, "sae", inputs, version=VERSION).done:
            warnings.warn(
                f"No SAE in '{folder}' was trained from this scale's recipe on this {backbone.name}, "
                "so it is trained here, which may take an hour; 'make saes' makes it once for all.",
                stacklevel=3,
            )
        return train_sae(images, backbone, sae_config, config, root, progress)
    found = load_shipped(name, folder, backbone.device, backbone.d_model)
    weights = read_index(folder)[found.name]["sha256"]
    stage = Stage.open(root, "sae", inputs | {"shipped": weights}, version=VERSION)

    def make() -> None:
        found.sae.save(stage.path)
        write_metrics(stage.path, found.metrics)
        stage.finish(*FILES, seed=config.seed, shipped=found.name, tokens=found.card.get("tokens"))

    stage.once(make)
    return Trained(found.sae, found.metrics, stage.path, found.name)


def put(name: str, trained: Trained, inputs: str, card: Mapping[str, object], folder: Path) -> Path:
    """Write an SAE as an artefact in half precision, each file atomically; `publish` makes it count.

    `inputs` is the `training_digest` that it is found by.

    Raises
    ------
    PatchSAEError : its weights are not finite in half precision.
    """
    here = folder / name
    weights = {key: w.detach().cpu().half().contiguous() for key, w in trained.sae.state_dict().items()}
    if not all(bool(value.isfinite().all()) for value in weights.values()):
        raise PatchSAEError(
            f"the SAE '{name}' has weights that half precision cannot hold; train it otherwise."
        )
    write_atomic(here / WEIGHTS, lambda path: save_file(weights, path))
    write_json(here / CONFIG, asdict(trained.sae.config))
    write_metrics(here, trained.metrics)
    facts = {"name": name, "inputs": inputs, "sae": asdict(trained.sae.config)}
    write_json(here / CARD, dict(card) | facts)
    return here


def publish(names: list[str], folder: Path, keep: bool = True) -> Path:
    """Write the index over artefacts that `put` wrote; `keep` leaves what else it names."""
    index = read_index(folder) if keep else {}
    for name in names:
        card = json.loads((folder / name / CARD).read_text("utf-8"))
        index[name] = {"inputs": card["inputs"], "sha256": file_digest(folder / name / WEIGHTS)}
    return write_json(folder / INDEX, index)
