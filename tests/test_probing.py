"""Sparse probes and absorption, on features whose meaning is planted."""

import numpy as np
import pytest
import torch
from tiny import tiny_backbone, tiny_images

from patchsae.latents.probing import absorption, contrasts, image_maxima, pick_features, probe_auroc
from patchsae.runs.errors import PatchSAEError
from patchsae.sae.model import SAE, SAEConfig
from patchsae.sae.step import latent_lists


def planted(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return 20 features: the seventh tells a concept, the third its absence, the rest nothing."""
    draw = np.random.default_rng(seed)
    there = draw.random(n) < 0.2
    x = draw.normal(size=(n, 20)).astype(np.float32)
    x[:, 7] += 3 * there
    x[:, 3] -= 2 * there
    x[:, 5] = 1.0  # says nothing, and has no spread
    return x, there


def test_the_largest_activations_of_images_are_those_of_the_dense_code():
    backbone, sae = tiny_backbone(), SAE(SAEConfig(d_in=32, expansion=4))
    with torch.no_grad():
        x = backbone.residual(backbone.normalize(tiny_images().load(range(6)).images))
        f = sae.encode(x)
    f[2] = 0  # an image in which nothing fires
    lists = latent_lists(sae, x.flatten(0, 1))
    kept = lists.index // x.shape[1] != 2
    found = image_maxima(lists, 6, x.shape[1])
    assert found.shape == (6, 128) and kept.any()
    np.testing.assert_allclose(found[[0, 1, 3, 4, 5]], f[[0, 1, 3, 4, 5]].amax(1), rtol=1e-5, atol=1e-6)
    with pytest.raises(PatchSAEError, match="5 images have 250 tokens, and the lists name another"):
        image_maxima(lists, 5, x.shape[1])


def test_features_are_chosen_by_how_far_apart_they_are():
    x, there = planted(2000, 0)
    other = x[:, 0] > 1
    contrast, second = contrasts(x, np.stack([there, other], 1))
    assert list(pick_features(contrast, 2)) == [7, 3]
    assert list(pick_features(contrast, 1, rising=True)) == [7]
    assert pick_features(contrast, 20, rising=True)[-1] == 3  # what falls comes last
    assert contrast[5] == 0 and pick_features(second, 1) == [0]
    np.testing.assert_allclose(
        contrast[7], (x[there, 7].mean() - x[~there, 7].mean()) / x[:, 7].std(), 1e-5
    )
    for nothing in (there | True, there & False):
        with pytest.raises(PatchSAEError, match="with the concept and images without"):
            contrasts(x, np.stack([there, nothing], 1))


def test_a_probe_knows_what_its_features_tell():
    def tells(test: tuple[np.ndarray, np.ndarray], k: int) -> float:
        kept = pick_features(contrasts(train[0], train[1][:, None])[0], k)
        return probe_auroc(*((x[:, kept], there) for x, there in (train, test)))

    train, test = planted(2000, 0), planted(2000, 1)
    one, two, every = (tells(test, k) for k in (1, 2, 20))
    assert one == pytest.approx(0.983, abs=0.01)  # Φ(3 / √2)
    assert one < two and abs(every - two) < 0.01
    shuffled = np.random.default_rng(2).permutation(test[1])
    assert tells((test[0], shuffled), 1) == pytest.approx(0.5, abs=0.04)
    for sides in ((train, (test[0], test[1] & False)), ((train[0], train[1] & False), test)):
        with pytest.raises(PatchSAEError, match="with the concept and images without"):
            probe_auroc(*sides)


def test_absorption_is_one_latent_in_the_place_of_another():
    gain = np.array([0.9, 0.8, 0.1, -0.9])
    f = np.array([
        [1, 0, 0, 0],  # its own latent fires
        [0, 2, 1, 5],  # another stands in; what points the other way does not count
        [0, 0, 0, 5],  # nothing stands in
        [0, 0, 0, 0],
    ], float)  # fmt: skip
    found = absorption(f, gain, 0)
    assert found.missed.tolist() == [False, True, True, True]
    assert found.absorbed.tolist() == [False, True, False, False]
    shared = np.array([[0, 1.0, 1.0, 0], [0, 1.0, 9.0, 0]])
    assert absorption(shared, np.array([0.9, 0.4, 0.4, 0]), 0).absorbed.tolist() == [True, True]
    three = absorption(np.array([[0, 1.0, 1.0, 1.0]]), np.array([0.9, 0.5, 0.5, 0.5]), 0)
    assert not three.absorbed.any()  # none of the three makes half
