"""What was found of known truth, kept in `results` like every other long computation."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from patchbook.chapters.factors import levels
from patchbook.chapters.truth import Dictionary, Explained, Truth, TruthConfig, known_truth
from patchbook.scenes.catalogue import concepts
from patchbook.scenes.sprites import packages
from patchsae.clip.backbone import Backbone
from patchsae.runs.errors import PatchSAEError
from patchsae.runs.intervals import Interval
from patchsae.runs.stage import Stage, write_atomic
from patchsae.sae.model import SAE

VERSION = 1  # raised when the same inputs give other numbers
RESULT = "truth.safetensors"
AHEAD, CEILING, EFFECTS = "ahead", "ceiling", "effects"


def keep_truth(sae: SAE, backbone: Backbone, config: TruthConfig, root: str | Path) -> Truth:
    """Return `known_truth`, from `root` if it is there.

    Raises
    ------
    PatchSAEError : as `known_truth`; what is kept is damaged.
    """
    inputs = {
        "sae": sae.fingerprint(),
        "backbone": backbone.fingerprint(),
        "config": asdict(config),
        "drawings": packages(),
        "concepts": [concept._asdict() for concept in concepts()],
    }
    stage = Stage.open(root, "truth", inputs, version=VERSION)
    path = stage.path / RESULT

    def make() -> None:
        arrays = _flat(known_truth(sae, backbone, config))
        write_atomic(path, lambda temporary: save_file(arrays, temporary))
        stage.finish(path.name, seed=config.seed)

    stage.once(make)
    try:
        return _whole(load_file(path))
    except (OSError, SafetensorError, KeyError) as error:
        raise PatchSAEError(
            f"'{path}' is damaged ({error}); delete {stage.path}, and run again."
        ) from error


def _flat(truth: Truth) -> dict[str, np.ndarray]:
    arrays = {AHEAD: np.array(truth.ahead, np.float64), CEILING: truth.ceiling}
    for name, found in truth.explained.items():
        arrays |= {f"{name}/{field}": np.ascontiguousarray(v) for field, v in found._asdict().items()}
        arrays[f"{name}/{EFFECTS}"] = np.ascontiguousarray(truth.effects[name])
    return arrays


def _whole(arrays: dict[str, np.ndarray]) -> Truth:
    explained, effects = {}, {}
    for name in Dictionary:
        fields = {field: arrays[f"{name}/{field}"] for field in Explained._fields}
        explained[name] = Explained(**fields | {"share": _interval(fields["share"])})
        effects[name] = arrays[f"{name}/{EFFECTS}"]
    return Truth(levels(), explained, effects, arrays[CEILING], _interval(arrays[AHEAD]))


def _interval(values: np.ndarray) -> Interval:
    return Interval(*(float(v) for v in values))
