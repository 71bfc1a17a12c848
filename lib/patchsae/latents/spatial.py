"""What maps and images say about a latent without any mask: spatial coherence and monosemanticity."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy.sparse import csr_array

from patchsae.latents.maps import Fired, grid_of
from patchsae.runs.errors import PatchSAEError
from patchsae.runs.threads import ranges, spread
from patchsae.sae.cpu_kernels import compiled

ROWS = 4096  # rows per task


def morans_i(found: Fired, grid: tuple[int, int]) -> np.ndarray:
    """Compute Moran's I of every row's map over 4-neighbours on the patch grid: float32 [R].

    I = (P / Σ w_ij) Σ w_ij z_i z_j / Σ z_i², z the map minus its mean (facts.md §7). 1 for smooth maps,
    -1/(P-1) on average if the values are dealt to patches at random. NaN for a map without contrast.
    """
    if found.patch.size and found.patch.max() >= grid[0] * grid[1]:
        grid_of(int(found.patch.max()) + 1, grid)
    out = np.empty(len(found.image), np.float32)
    args = found.start, found.patch, found.value, *grid, out
    spread(lambda a, b: moran(*args, a, b), ranges(len(out), ROWS))
    return out


@compiled
def moran(start, patch, value, rows, columns, out, first, last):
    """Write Moran's I of rows first … last - 1 into `out`; `start` [R + 1] bounds each row's entries."""
    patches, table = rows * columns, np.zeros(rows * columns)
    weights = 2 * (rows * (columns - 1) + columns * (rows - 1))
    for row in range(first, last):
        a, b = start[row], start[row + 1]
        total, square = 0.0, 0.0
        for e in range(a, b):
            table[patch[e]] = value[e]
            total += value[e]
        mean = total / patches
        # Σ w z_i z_j = Σ w v_i v_j - 2 m Σ d_i v_i + m² Σ w, with d_i the neighbours of i: silent patches
        # need no visit
        pairs, degrees = 0.0, 0.0
        for e in range(a, b):
            p, v = patch[e], table[patch[e]]
            y, x = p // columns, p % columns
            square += v * v
            if x + 1 < columns:
                pairs += 2 * v * table[p + 1]
            if y + 1 < rows:
                pairs += 2 * v * table[p + columns]
            degrees += v * ((x > 0) + (x + 1 < columns) + (y > 0) + (y + 1 < rows))
        spread_ = square - patches * mean * mean
        if spread_ > 1e-9 * square:
            out[row] = patches / weights * (pairs - 2 * mean * degrees + mean * mean * weights) / spread_
        else:
            out[row] = np.nan
        for e in range(a, b):
            table[patch[e]] = 0.0


class Monosemanticity(NamedTuple):
    """How alike the images are that a latent fires on."""

    score: np.ndarray
    """Mean cosine of two images, both drawn by activation: float64 [S]; NaN for fewer than two images."""
    chance: float
    """Mean cosine of any two images: what images dealt to the latent at random score on average."""


def monosemanticity(activation: csr_array, embeddings: np.ndarray) -> Monosemanticity:
    """Compute the monosemanticity score (Pach et al. 2025, facts.md §7) in O(N), float64.

    With ã the activations of a latent scaled to 0 … 1 over the images and e_i their unit embeddings,
    Σ_{i<j} ã_i ã_j ⟨e_i, e_j⟩ / Σ_{i<j} ã_i ã_j = (‖Σ ã_i e_i‖² - Σ ã_i²) / ((Σ ã_i)² - Σ ã_i²).

    Parameters
    ----------
    activation : [N, S] image-level activations, non-negative
    embeddings : [N, e], any length but 0; from an encoder that is not the one explained, or the score asks
        the model what it finds alike

    Raises
    ------
    PatchSAEError : other numbers of images; an embedding of length 0.
    """
    a, e = csr_array(activation, dtype=np.float64), np.asarray(embeddings, np.float64)
    length = np.linalg.norm(e, axis=1, keepdims=True)
    if len(e) != a.shape[0]:
        raise PatchSAEError(f"{a.shape[0]} images have activations, {len(e)} embeddings; embed the same.")
    if not (length > 0).all():
        raise PatchSAEError("an embedding has length 0, so it has no direction; use another encoder.")
    e /= length
    n, together = len(e), e.sum(0)
    # Only where a latent is never silent is its minimum not 0; the division by the range cancels.
    low = np.asarray(a.min(axis=0).todense()).ravel()
    above = np.asarray((a != 0).sum(0)).ravel()
    for s in np.flatnonzero(low):
        above[s] = (a[:, [s]].toarray() > low[s]).sum()
    total, square = np.asarray(a.sum(0)).ravel(), np.asarray(a.multiply(a).sum(0)).ravel()
    square = square - 2 * low * total + n * low**2
    total = total - n * low
    summed = a.T @ e - low[:, None] * together
    with np.errstate(invalid="ignore", divide="ignore"):
        score = ((summed**2).sum(1) - square) / (total**2 - square)
    chance = (together @ together - n) / (n * (n - 1)) if n > 1 else np.nan
    return Monosemanticity(np.where(above >= 2, score, np.nan), float(chance))
