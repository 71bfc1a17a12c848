"""Word cards, AUROC against scikit-learn, and what counts as a latent that reads and sees."""

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from patchbook.chapters.reading import auroc, multimodal, word_cards
from patchsae.runs.errors import PatchSAEError


def test_cards_show_their_word_and_follow_from_the_seed():
    cards = word_cards(["CAT", "BRIDGE"], 6, 112, seed=1)
    assert cards.images.shape == (12, 3, 112, 112) and cards.images.dtype == torch.uint8
    assert cards.labels.tolist() == [0, 1] * 6
    again, other = (
        word_cards(["CAT", "BRIDGE"], 6, 112, seed=1),
        word_cards(["CAT", "BRIDGE"], 6, 112, seed=2),
    )
    assert torch.equal(cards.images, again.images) and not torch.equal(cards.images, other.images)
    more = word_cards(["CAT", "BRIDGE"], 8, 112, seed=1)
    assert torch.equal(more.images[:12], cards.images)
    for image, mask in zip(cards.images.permute(0, 2, 3, 1).numpy(), cards.masks, strict=True):
        assert 0.03 < mask.mean() < 0.8
        plate = image[mask].mean(1)
        assert (plate > 250).mean() > 0.3 and (plate < 60).mean() > 0.05  # white paper, black ink


def test_auroc_is_scikit_learns():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 60)
    activation = np.round(rng.random((60, 9)) * (rng.random((60, 9)) < 0.5), 1)  # with ties
    activation[:, 2] = 0
    found = auroc(activation, labels)
    for c in range(4):
        for s in range(9):
            assert found[c, s] == pytest.approx(roc_auc_score(labels == c, activation[:, s]))
    assert (found[:, 2] == 0.5).all()


def test_planted_pairs_are_found_and_beat_the_null():
    rng = np.random.default_rng(0)
    written, seen = rng.random((2, 20, 50)) * 0.8
    for concept, latent in ((3, 7), (12, 30), (5, 5), (6, 41)):
        written[concept, latent], seen[concept, latent] = 0.95 + latent / 1000, 0.99
    written[1, 2], seen[4, 2] = 1, 1  # reads one thing and sees another
    found = multimodal(written, seen)
    assert list(zip(found.concept, found.latent, strict=True)) == [(6, 41), (12, 30), (3, 7), (5, 5)]
    assert len(found.latent) > np.quantile(found.null, 0.99)
    assert found.null.mean() == pytest.approx(
        5 / 20, abs=0.1
    )  # five words told, each meets its thing 1 in 20
    nothing = multimodal(written, seen, level=1.01)
    assert len(nothing.latent) == 0 and not nothing.null.any()


def test_bad_requests_are_named():
    with pytest.raises(PatchSAEError, match="at least one text"):
        word_cards([], 3, 112)
    with pytest.raises(PatchSAEError, match="at least two"):
        auroc(np.ones((4, 2)), np.zeros(4, int))
