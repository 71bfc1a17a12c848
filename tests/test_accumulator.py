"""Every sum of the one pass against a naive dense computation, and merging in any order."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from patchsae.latents.accumulator import ADDED, EDGES, TOP, Accumulator
from patchsae.runs.errors import PatchSAEError
from patchsae.sae.cpu import Lists

N, T, S, C, K, M = 200, 9, 700, 6, 4, 5
KIND = np.array([0] + [1] * 7 + [2], np.int8)  # CLS, patches and a prompt token
TAU = 0.2


@pytest.fixture(scope="module")
def latents() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    f = np.maximum(rng.standard_normal((N, T, S)) - 1.2, 0).astype(np.float32)
    f *= 10 ** rng.uniform(-3, 1, S).astype(np.float32)
    f[:, :, 3] = 0  # a dead latent
    f[5, :, 6] = f[4, :, 6]  # a tie between images
    f[7, :, 9] = f[7, :, 8]  # a tie between latents
    f[11] = 0  # an image without any
    return f, rng.integers(0, C, N)


def lists_of(f: np.ndarray) -> Lists:
    """Turn latents [B, T, S] into latent-major lists."""
    flat = f.reshape(-1, f.shape[-1]).T
    latent, token = np.nonzero(flat)
    start = np.concatenate([[0], np.cumsum(np.bincount(latent, minlength=f.shape[-1]))])
    return Lists(start, token.astype(np.int32), flat[latent, token])


def accumulate(latents, part: np.ndarray, batch: int = 16) -> Accumulator:
    f, labels = latents
    sums = Accumulator(S, C, N, KIND, TAU, K, M)
    for start in range(0, len(part), batch):
        here = part[start : start + batch]
        sums.update(lists_of(f[here]), labels[here], here)
    return sums


def test_every_field_equals_the_naive_computation(latents):
    f, labels = latents
    sums = accumulate(latents, np.arange(N))
    exact, over = f.astype(np.float64), f > np.float32(TAU)
    mean = exact.mean(1)
    assert sums.images == N and sums.seen.all()
    np.testing.assert_array_equal(sums.active_images, (f > 0).any(1).sum(0))
    np.testing.assert_array_equal(sums.tau_images, over.any(1).sum(0))
    np.testing.assert_array_equal(sums.class_images, np.bincount(labels))
    for k in range(3):
        where = KIND == k
        np.testing.assert_array_equal(sums.active_tokens[k], (f[:, where] > 0).sum((0, 1)))
        np.testing.assert_allclose(sums.token_sum[k], exact[:, where].sum((0, 1)), rtol=1e-10)
        for c in range(C):
            expected = over[labels == c][:, where].sum((0, 1))
            np.testing.assert_array_equal(sums.class_count[k, :, c], expected)
    for c in range(C):
        np.testing.assert_allclose(sums.class_sum[:, c], mean[labels == c].sum(0), rtol=1e-10)
    with np.errstate(divide="ignore"):
        place = np.searchsorted(EDGES, np.log10(exact))
    for s in range(S):
        bins = np.bincount(place[..., s][f[..., s] > 0], minlength=len(EDGES) + 1)
        np.testing.assert_array_equal(sums.histogram[s], bins)
        best = [i for i in sorted(range(N), key=lambda i: (-np.float32(mean[i, s]), i)) if mean[i, s] > 0][
            :K
        ]
        filled = len(best)
        assert sums.top_index[s].tolist() == best + [-1] * (K - filled)
        assert sums.top_label[s, :filled].tolist() == labels[best].tolist()
        np.testing.assert_allclose(sums.top_value[s, :filled], mean[best, s], rtol=1e-6)
        assert sums.top_count[s, :filled].tolist() == over[best][..., s].sum(1).tolist()
    assert (sums.top_index[3] == -1).all()
    for i in range(N):
        order = sorted(range(S), key=lambda s: (-np.float32(mean[i, s]), s))
        best = [s for s in order if mean[i, s] > 0][:M]
        assert sums.image_latent[i].tolist() == best + [-1] * (M - len(best))
        np.testing.assert_allclose(sums.image_value[i, : len(best)], mean[i, best], rtol=1e-6)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_any_partition_merged_in_any_order_is_the_same(latents, data):
    order = np.array(data.draw(st.permutations(range(N))))
    cuts = data.draw(st.lists(st.integers(0, N), max_size=4).map(sorted))
    batch = data.draw(st.sampled_from([1, 7, 64]))
    parts = [accumulate(latents, part, batch) for part in np.split(order, cuts)]
    merged = parts.pop(data.draw(st.integers(0, len(parts) - 1)))
    for part in data.draw(st.permutations(parts)):
        merged.merge(part)
    whole = accumulate(latents, np.arange(N))
    for name in (*ADDED, *TOP, "seen", "image_latent", "image_value"):
        if name in ("token_sum", "class_sum"):
            np.testing.assert_allclose(getattr(merged, name), getattr(whole, name), rtol=1e-12)
        else:
            np.testing.assert_array_equal(getattr(merged, name), getattr(whole, name), name)


def test_save_and_load_round_trip(latents, tmp_path):
    sums = accumulate(latents, np.arange(50))
    sums.save(tmp_path / "part.safetensors", skipped={"3": "why"})
    again = Accumulator(S, C, N, KIND, TAU, K, M)
    assert again.load(tmp_path / "part.safetensors") == {"skipped": {"3": "why"}}
    for name in (*ADDED, *TOP, "seen", "image_latent", "image_value"):
        np.testing.assert_array_equal(getattr(again, name), getattr(sums, name))
    path = tmp_path / "part.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(PatchSAEError, match="no part of this atlas"):
        again.load(path)
    sums.save(path)
    with pytest.raises(PatchSAEError, match="no part of this atlas"):
        Accumulator(S + 1, C, N, KIND, TAU, K, M).load(path)


def test_an_image_counted_twice_is_refused(latents):
    one, other = accumulate(latents, np.arange(5)), accumulate(latents, np.arange(4, 9))
    with pytest.raises(PatchSAEError, match="image 4 .*both parts"):
        one.merge(other)
