"""Moran's I and monosemanticity against their quadratic definitions."""

import numpy as np
import pytest
from scipy.sparse import csr_array

from patchsae.latents.maps import Fired
from patchsae.latents.spatial import monosemanticity, morans_i
from patchsae.runs.errors import PatchSAEError


def rows_of(maps: np.ndarray) -> Fired:
    """Turn dense maps [R, P] into rows of active patches."""
    row, patch = np.nonzero(maps)
    start = np.searchsorted(row, np.arange(len(maps) + 1))
    return Fired(np.arange(len(maps)), np.zeros(len(maps), int), start, patch, maps[row, patch])


def naive_moran(values: np.ndarray, grid: tuple[int, int]) -> float:
    y, x = np.divmod(np.arange(grid[0] * grid[1]), grid[1])
    near = np.abs(y[:, None] - y) + np.abs(x[:, None] - x) == 1
    z = values - values.mean()
    return len(z) / near.sum() * (near * np.outer(z, z)).sum() / (z**2).sum()


@pytest.mark.parametrize("grid", [(4, 6), (1, 9), (14, 14)])
def test_morans_i_is_its_definition(grid):
    rng = np.random.default_rng(0)
    shape = (20, grid[0] * grid[1])
    maps = (rng.random(shape) * (rng.random(shape) < 0.3) + 0).astype(np.float32)
    maps[3] = rng.random(shape[1])  # active everywhere
    maps = maps[(maps > 0).any(1)]
    found = morans_i(rows_of(maps), grid)
    naive = [naive_moran(m.astype(float), grid) for m in maps]
    np.testing.assert_allclose(found, naive, rtol=1e-4, atol=1e-6)


def test_morans_i_of_known_maps():
    board = np.indices((6, 6)).sum(0) % 2
    half = np.repeat([1, 0], 18).reshape(6, 6)
    flat = np.ones((6, 6))
    maps = np.stack([board, half, flat]).reshape(3, -1).astype(np.float32)
    checked, smooth, constant = morans_i(rows_of(maps), (6, 6))
    assert checked == pytest.approx(-1) and smooth == pytest.approx(0.8) and np.isnan(constant)
    rng = np.random.default_rng(1)
    dealt = np.stack([rng.permutation(maps[1]) for _ in range(3000)])
    assert morans_i(rows_of(dealt), (6, 6)).mean() == pytest.approx(-1 / 35, abs=0.006)


def naive_monosemanticity(a: np.ndarray, e: np.ndarray) -> float:
    a = (a - a.min()) / (a.max() - a.min())
    e = e / np.linalg.norm(e, axis=1, keepdims=True)
    pairs = [(i, j) for i in range(len(a)) for j in range(i + 1, len(a))]
    weight = sum(a[i] * a[j] for i, j in pairs)
    return sum(a[i] * a[j] * (e[i] @ e[j]) for i, j in pairs) / weight


def test_monosemanticity_is_its_definition():
    rng = np.random.default_rng(0)
    activation = rng.random((40, 12)) * (rng.random((40, 12)) < 0.3)
    activation[:, 4] = 0  # dead
    activation[:, 5] = 0
    activation[7, 5] = 1  # one image
    activation[:, 6] = rng.random(40) + 2  # never silent: its minimum is not 0
    embeddings = rng.standard_normal((40, 5)) + 0.4
    found = monosemanticity(csr_array(activation), embeddings)
    assert np.isnan(found.score[[4, 5]]).all()
    for s in (0, 1, 2, 3, 6, 7, 8, 9, 10, 11):
        naive = naive_monosemanticity(activation[:, s], embeddings)
        assert found.score[s] == pytest.approx(naive, rel=1e-10)
    unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    assert found.chance == pytest.approx((unit @ unit.T)[np.triu_indices(40, 1)].mean(), rel=1e-12)
    orders = [rng.permutation(40) for _ in range(400)]
    dealt = [monosemanticity(csr_array(activation), embeddings[order]).score for order in orders]
    assert np.nanmean(dealt) == pytest.approx(found.chance, abs=0.01)


def test_monosemanticity_of_one_hot_labels_is_the_share_of_equal_pairs():
    labels = np.array([0, 0, 0, 1, 1, 2])
    activation = csr_array(np.array([[1, 1, 1, 0, 0, 0], [1, 1, 0, 1, 0, 0]]).T)
    found = monosemanticity(activation, np.eye(3)[labels])
    np.testing.assert_allclose(found.score, [1, 1 / 3])


def test_bad_embeddings_are_named():
    activation = csr_array(np.ones((3, 2)))
    with pytest.raises(PatchSAEError, match="3 images have activations, 2 embeddings"):
        monosemanticity(activation, np.ones((2, 4)))
    with pytest.raises(PatchSAEError, match="has length 0"):
        monosemanticity(activation, np.zeros((3, 4)))
    with pytest.raises(PatchSAEError, match="does not fit 2×2 patches"):
        morans_i(rows_of(np.ones((1, 9), np.float32)), (2, 2))
