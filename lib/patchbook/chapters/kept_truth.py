"""What was found of known truth, kept in `results` like every other long computation."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from patchbook.chapters.truth import Truth, TruthConfig, known_truth
from patchbook.kept import keep
from patchbook.scenes.catalogue import concepts
from patchbook.scenes.sprites import packages
from patchsae.clip.backbone import Backbone
from patchsae.sae.model import SAE

VERSION = 2  # raised when the same inputs give other numbers


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
    return keep(root, "truth", Truth, lambda: known_truth(sae, backbone, config), inputs, VERSION)
