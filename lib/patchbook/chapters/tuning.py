"""What the search of the book's recipe found, read from the table that `artefacts/sae/search.py` wrote."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import NamedTuple

from patchbook.shipped import shelf
from patchsae.runs.errors import PatchSAEError
from patchsae.sae.model import CONFIG

MOST_L0, MOST_COSINE, LEAST_KEPT = 0.2, 0.5, 0.95  # the rule, as artefacts/sae/search.py states it


class Candidate(NamedTuple):
    """One recipe that was tried, measured on validation scenes."""

    name: str
    cosine: float
    """Mean cosine of decoder rows with their random start."""
    l0: float
    """Active latents per token."""
    fvu: float
    """Fraction of variance unexplained."""
    pca: float
    """The same of as many principal components as latents are active."""
    kept: float
    """Accuracy through the reconstruction over that of the model as it is."""
    purity: float
    """Mean share of a latent's references that show its most frequent object."""
    untrained: float
    """The same of random weights."""

    def passes(self, width: int) -> bool:
        """Tell whether it is sparse, has learned, beats PCA and keeps the accuracy."""
        sparse, moved = self.l0 <= MOST_L0 * width, self.cosine <= MOST_COSINE
        return sparse and moved and self.fvu < self.pca and self.kept >= LEAST_KEPT


class Search(NamedTuple):
    """All that was tried."""

    candidates: tuple[Candidate, ...]
    width: int
    """Of a token."""

    @property
    def chosen(self) -> Candidate:
        """Return the candidate with the purest latents among those that pass, or among all if none does."""
        fit = [one for one in self.candidates if one.passes(self.width)]
        return max(fit or self.candidates, key=lambda one: one.purity)


COLUMNS = {
    "candidate": "name",
    "cosine with start": "cosine",
    "L0": "l0",
    "FVU": "fvu",
    "FVU of PCA": "pca",
    "accuracy kept": "kept",
    "purity": "purity",
    "purity untrained": "untrained",
}


def read_search(folder: Path | None = None) -> Search:
    """Read `search.csv` and the width of the main autoencoder beside it.

    Raises
    ------
    PatchSAEError : a file or a column is missing, or a number is none.
    """
    folder = folder or shelf()
    path = folder / "search.csv"
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        width = int(json.loads((folder / "main" / CONFIG).read_text("utf-8"))["d_in"])
        found = [
            Candidate(**{f: row[c] if f == "name" else float(row[c]) for c, f in COLUMNS.items()})
            for row in rows
        ]
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise PatchSAEError(
            f"'{path}' cannot be read ({error!r}); run artefacts/sae/search.py, or take it from git."
        ) from error
    if not found:
        raise PatchSAEError(f"'{path}' has no row; run artefacts/sae/search.py, or take it from git.")
    return Search(tuple(found), width)
