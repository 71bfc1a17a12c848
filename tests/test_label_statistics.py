"""Entropies, spreads, purity, regions and co-activation from their definitions."""

import numpy as np
import pytest
import xarray as xr

from patchsae.latents.label_statistics import (
    co_activation,
    label_entropy,
    label_std,
    pick_regions,
    pick_shared,
    pick_typical,
    purity,
    reference_entropy,
    reference_std,
)
from patchsae.runs.errors import PatchSAEError


def test_label_entropy_and_spread_follow_equation_3():
    rng = np.random.default_rng(0)
    mass = rng.random((5, 8)) * (rng.random((5, 8)) < 0.7)
    mass[:, 2] = 0
    for s in range(8):
        if s == 2:
            assert np.isnan(label_entropy(mass)[s]) and np.isnan(label_std(mass)[s])
            continue
        p = mass[:, s] / mass[:, s].sum()
        assert label_entropy(mass)[s] == pytest.approx(-sum(q * np.log(q) for q in p if q))
        centre = (p * np.arange(5)).sum()
        assert label_std(mass)[s] == pytest.approx(np.sqrt((p * (np.arange(5) - centre) ** 2).sum()))


def test_reference_entropy_is_zero_for_one_label_and_log_k_for_equal_shares():
    value = np.ones((4, 2))
    label = np.array([[1, 0], [1, 1], [1, 2], [1, 3]])
    np.testing.assert_allclose(reference_entropy(value, label), [0, np.log(4)], atol=1e-12)
    np.testing.assert_allclose(reference_std(value, label), [0, np.std([0, 1, 2, 3])], atol=1e-12)


def test_reference_entropy_sums_the_activation_of_a_label():
    value, label = np.array([[3.0], [2.0], [1.0]]), np.array([[7], [2], [7]])
    p = np.array([4 / 6, 2 / 6])
    np.testing.assert_allclose(reference_entropy(value, label), [-(p * np.log(p)).sum()])


def test_purity_of_random_labels_is_the_null_and_of_pure_ones_is_one():
    rng = np.random.default_rng(0)
    random = purity(rng.integers(0, 20, (10, 400)))
    assert abs(random.observed.mean() - random.null.mean()) < 4 * random.null.std() + 0.01
    pure = purity(np.repeat(rng.integers(0, 20, (1, 400)), 10, 0))
    assert (pure.observed == 1).all() and pure.null.mean() < 0.4


def test_regions_follow_their_rule():
    rng = np.random.default_rng(0)
    index = rng.integers(0, 50, (4, 60))
    index[3, :10] = -1  # no full set of references
    fields = {
        name: ("latent", rng.random(60)) for name in ("image_frequency", "mean_activation", "entropy")
    }
    atlas = xr.Dataset(fields | {"top_index": (("rank", "latent"), index)})
    picked, full = pick_regions(atlas), np.arange(60) >= 10
    frequency, mean, spread = (atlas[name].values for name in fields)
    (rare, often), (weak, strong) = (np.quantile(v[full], (1 / 3, 2 / 3)) for v in (frequency, mean))
    members = {
        "a": np.flatnonzero(full & (frequency <= rare) & (mean <= weak)),
        "b": np.flatnonzero(full & (frequency <= rare) & (mean >= strong)),
        "c": np.flatnonzero(full & (frequency >= often) & (mean >= strong)),
        "d": np.flatnonzero(full & (frequency >= often) & (mean >= strong)),
    }
    assert set(picked) == {name for name, found in members.items() if len(found)} and len(picked) > 2
    for name, latent in picked.items():
        found = members[name]
        best = spread[found].argmax() if name in "ac" else spread[found].argmin()
        assert latent == found[best]
    with pytest.raises(PatchSAEError, match="full set of reference images"):
        pick_regions(atlas.isel(latent=slice(10)))


def test_co_activation_counts_images_that_hold_both():
    top = np.array([[1, 2], [2, 3], [3, -1], [2, 1]])
    atlas = xr.Dataset({"image_latent": (("image", "place"), top)})
    assert co_activation(atlas, np.array([1, 2, 3])).tolist() == [[2, 2, 0], [2, 3, 1], [0, 1, 2]]


def at_home(rows: list[list[int]]) -> xr.Dataset:
    return xr.Dataset({"top_index": (("rank", "latent"), np.array(rows))})


def test_shared_latents_have_all_references_everywhere():
    described = xr.Dataset({"entropy": ("latent", [0.1, 2.0, np.nan, 1.0, 3.0, 0.5])})
    everywhere = at_home([[1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6]])
    some = at_home([[4, 4, 4, 4, 4, 4], [-1, 5, 5, 5, -1, 5]])  # latents 0 and 4 lack a reference
    assert pick_shared(described, [everywhere, some]) == [5, 1]
    assert pick_shared(described, [everywhere]) == [0, 4]
    assert pick_shared(described, [some, at_home([[7, -1, 7, 7, 7, -1]])]) == [3]  # one latent, once
    assert pick_shared(described, [some, at_home([[-1] * 6])]) == []


def counted(count: list[int], frequency: list[float], tokens: int) -> xr.Dataset:
    fields = {"dataset_count": ("latent", count), "image_frequency": ("latent", frequency)}
    return xr.Dataset(fields, attrs={"tokens": tokens})


def test_typical_latents_favour_their_data_set():
    often = [0.5, 0.5, 0.5, 0.05]
    first = counted([80, 50, 0, 9], often, 100)  # shares .8, .5, 0, .09
    second = counted([800, 100, 0, 0], often, 1000)  # shares .8, .1, 0, 0
    # latent 1 has 5/3 of its mean share in the first, latent 3 even twice, but on too few images
    assert pick_typical([first, second]) == [1, 0]
    assert pick_typical([first, second], least=0.01) == [3, 0]
    # latent 1 is taken; nothing else is frequent enough, so the most frequent one that is left
    third = counted([0, 90, 3, 1], [0.04, 0.9, 0.02, 0.01], 100)
    assert pick_typical([first, third]) == [0, 1]
    assert pick_typical([third, third]) == [1, 0]
