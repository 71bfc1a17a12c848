"""What this project ships beside its code: the small CLIP and the main autoencoder that reads it.

In a clone they lie in `artefacts/`; a wheel puts them into `share/patchsae/` of the environment.
"""

from __future__ import annotations

import site
import sys
from collections.abc import Iterator
from pathlib import Path

from patchsae.runs.errors import PatchSAEError

PREFIX = "patchsae:"
SHARED = Path("share") / "patchsae"


def artefact(name: str) -> Path:
    """Return the folder of an artefact, such as `small_clip` or `sae/main`.

    Raises
    ------
    PatchSAEError : it is not there; names the places that were looked at.
    """
    places = list(dict.fromkeys(_places()))
    for place in places:
        if (found := place / name).is_dir() and found.resolve().is_relative_to(place.resolve()):
            return found
    where = ", ".join(str(place) for place in places)
    raise PatchSAEError(
        f"there is no '{PREFIX}{name}' in {where}: correct the name, or install patchsae from its wheel."
    )


def artefact_of(name: str) -> Path | None:
    """Return the folder that `patchsae:<name>` means; None for a name without the prefix."""
    return artefact(name.removeprefix(PREFIX)) if name.startswith(PREFIX) else None


def _places() -> Iterator[Path]:
    packages = Path(__file__).resolve().parents[2]
    if (packages.parent / "pyproject.toml").is_file():
        yield packages.parent / "artefacts"
    yield packages / SHARED  # pip install --target
    yield Path(sys.prefix) / SHARED
    if base := site.getuserbase():
        yield Path(base) / SHARED
