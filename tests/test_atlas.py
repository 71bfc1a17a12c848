"""Every field of the atlas against a naive dense computation, and merging in any order."""

import numpy as np
import pytest
import torch

from patchsae.atlas import Accumulator, AtlasConfig, pick_regions, purity, reference_entropy
from patchsae.errors import PatchSAEError
from patchsae.localization import mass_inside, patch_cover, upsample

N, T, S, C, K = 60, 7, 13, 5, 4


@pytest.fixture(scope="module")
def latents():
    draw = torch.Generator().manual_seed(0)
    f = torch.randn(N, T, S, generator=draw).sub(0.9).relu()
    f[:, :, 3] = 0  # a dead latent
    f[5, :, 6] = f[4, :, 6]  # a tie
    labels = torch.randint(0, C, (N,), generator=draw)
    return f, labels


def accumulate(f, labels, parts) -> Accumulator:
    sums = Accumulator(S, C, AtlasConfig(k=K))
    for part in parts:
        one = Accumulator(S, C, AtlasConfig(k=K))
        one.update(f[part], labels[part], torch.as_tensor(part))
        sums.merge(one)
    return sums


def test_every_field_equals_the_naive_computation(latents):
    f, labels = latents
    sums = Accumulator(S, C, AtlasConfig(k=K))
    for start in range(0, N, 16):
        part = torch.arange(start, min(start + 16, N))
        sums.update(f[part], labels[part], part)
    atlas = sums.dataset(tuple("abcde"))
    dense, label = f.double().numpy(), labels.numpy()
    mean = f.mean(1).double().numpy()
    np.testing.assert_allclose(atlas.frequency, (dense.max(1) > 0).mean(0))
    np.testing.assert_allclose(atlas.token_frequency, (dense > 0).mean((0, 1)))
    for s in range(S):
        active = mean[:, s] > 0
        row = atlas.isel(latent=s)
        if s == 3:
            assert np.isnan(row.mean_activation) and np.isnan(row.entropy)
            assert np.isnan(row.entropy_references) and (row.top_index == -1).all()
            continue
        np.testing.assert_allclose(row.mean_activation, mean[active, s].mean(), rtol=1e-6)
        for c in range(C):
            assert row.class_count[c] == (dense[label == c, :, s] > 0.2).sum()
            np.testing.assert_allclose(row.class_sum[c], mean[label == c, s].sum(), rtol=1e-6, atol=1e-12)
        best = sorted(range(N), key=lambda i: (-mean[i, s], i))[:K]
        assert row.top_index.values.tolist() == best
        assert row.top_label.values.tolist() == label[best].tolist()
        p = np.array([mean[label == c, s].sum() for c in range(C)])
        p = p[p > 0] / p.sum()
        np.testing.assert_allclose(row.entropy, -(p * np.log(p)).sum(), rtol=1e-6)
        value = mean[best, s]
        q = np.array([value[label[best] == c].sum() for c in set(label[best])]) / value.sum()
        np.testing.assert_allclose(row.entropy_references, -(q * np.log(q)).sum(), rtol=1e-5, atol=1e-7)
        w = value / value.sum()
        centre = (w * label[best]).sum()
        np.testing.assert_allclose(
            row.label_std, np.sqrt((w * (label[best] - centre) ** 2).sum()), rtol=1e-5
        )


@pytest.mark.parametrize("seed", range(5))
def test_any_partition_merged_in_any_order_is_the_same(latents, seed):
    f, labels = latents
    rng = np.random.default_rng(seed)
    cuts = np.sort(rng.choice(np.arange(1, N), 4, replace=False))
    parts = np.split(rng.permutation(N), cuts)
    whole, split = accumulate(f, labels, [np.arange(N)]), accumulate(f, labels, parts)
    for name in ("images", "tokens", "class_images", "active_images", "active_tokens", "class_count"):
        np.testing.assert_array_equal(getattr(whole, name), getattr(split, name))
    for name in ("top_value", "top_index", "top_label"):
        np.testing.assert_array_equal(getattr(whole, name), getattr(split, name))
    np.testing.assert_allclose(whole.class_sum, split.class_sum, rtol=1e-12)


def test_reference_entropy_is_zero_for_one_label_and_log_k_for_equal_shares():
    value = np.ones((4, 2))
    label = np.array([[1, 0], [1, 1], [1, 2], [1, 3]])
    np.testing.assert_allclose(reference_entropy(value, label), [0, np.log(4)], atol=1e-12)


def test_purity_of_random_labels_is_the_null_and_of_pure_ones_is_one():
    rng = np.random.default_rng(0)
    random = purity(rng.integers(0, 20, (10, 400)))
    assert abs(random.observed.mean() - random.null.mean()) < 4 * random.null.std() + 0.01
    pure = purity(np.repeat(rng.integers(0, 20, (1, 400)), 10, 0))
    assert (pure.observed == 1).all() and pure.null.mean() < 0.4


def test_regions_follow_their_rule(latents):
    f, labels = latents
    atlas = accumulate(f, labels, [np.arange(N)]).dataset(tuple("abcde"))
    frequency, mean = np.random.default_rng(0).random((2, S))
    atlas["frequency"], atlas["mean_activation"] = ("latent", frequency), ("latent", mean)
    picked = pick_regions(atlas)
    full = (atlas.top_index.values >= 0).all(0)
    assert not full[3]
    (rare, often), (weak, strong) = (np.quantile(v[full], (1 / 3, 2 / 3)) for v in (frequency, mean))
    spread = atlas.entropy.values
    members = {
        "a": np.flatnonzero(full & (frequency <= rare) & (mean <= weak)),
        "c": np.flatnonzero(full & (frequency >= often) & (mean >= strong)),
    }
    assert any(len(found) for found in members.values())
    for name, found in members.items():
        assert (name in picked) == bool(len(found))
        if len(found):
            assert picked[name] == found[spread[found].argmax()]
    if "d" in picked:
        assert picked["d"] == members["c"][spread[members["c"]].argmin()]


def test_mass_inside_splits_by_the_mask():
    f = torch.zeros(2, 4, 3)
    f[0, 1, 0], f[0, 2, 0], f[1, :, 1] = 3.0, 1.0, 2.0
    cover = torch.tensor([[0.0, 1.0, 0.5, 0.0], [1.0, 0.0, 0.0, 0.0]])
    found = mass_inside(f, cover)
    np.testing.assert_allclose(found.inside, [3.5, 2.0, 0.0])
    np.testing.assert_allclose(found.total, [4.0, 8.0, 0.0])
    np.testing.assert_allclose(found.expected, [4 * 0.375, 8 * 0.25, 0.0])


def test_patch_cover_and_upsample():
    masks = torch.zeros(1, 8, 8, dtype=torch.bool)
    masks[0, :4, :2] = True
    assert patch_cover(masks, (2, 2)).tolist() == [[0.5, 0.0, 0.0, 0.0]]
    enlarged = upsample(torch.tensor([1.0, 0, 0, 2.0]), (2, 2), 8)
    assert enlarged[:4, :4].min() == 1 and enlarged[4:, 4:].max() == 2 and enlarged[0, 7] == 0


def test_bad_input_is_named():
    with pytest.raises(PatchSAEError, match="tau=-0.1"):
        AtlasConfig(tau=-0.1)
    with pytest.raises(PatchSAEError, match="k=0"):
        AtlasConfig(k=0)
