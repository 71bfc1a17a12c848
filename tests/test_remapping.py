"""Groups, correlations and mixed models against what they are by definition."""

import numpy as np
import pytest
import torch
from test_prompts import learned, make

from patchbook.scenes.embedded import SINGLE, SceneSet
from patchsae.adaptation.remapping import (
    PARTS,
    Parts,
    Reading,
    class_counts,
    compare_counts,
    correlation,
    group_table,
    improvement_rate,
    mix_models,
    selection_half,
)
from patchsae.clip.backbone import zero_shot_logits, zero_shot_weights
from patchsae.masking import sweep as masking
from patchsae.runs.errors import PatchSAEError
from patchsae.runs.intervals import difference_of_shares, mcnemar, share_of_gain
from patchsae.sae.model import SAE, SAEConfig


def counts(seed: int, classes: int = 3, latents: int = 40) -> np.ndarray:
    """Return heavy-tailed counts with ties and zeros."""
    return (np.random.default_rng(seed).pareto(1.0, (classes, latents)) * 3).astype(np.int64)


@pytest.mark.parametrize("seed", range(5))
def test_groups_by_value_are_those_of_the_pooled_counts(seed):
    before, after = counts(seed), counts(seed + 100)
    found = compare_counts(before, after, Reading.VALUE, upper=6, lower=15)
    for c in range(len(before)):
        pooled = sorted([*before[c], *after[c]], reverse=True)
        high, low = pooled[5], pooled[14]
        for s in range(before.shape[1]):
            x, y = before[c, s], after[c, s]
            assert found.high[c, s] == (x >= high and y >= high and min(x, y) > 0)
            assert found.high_to_low[c, s] == (x >= high and x > 0 and y < low)
            assert found.low_to_high[c, s] == (y >= high and y > 0 and x < low)


@pytest.mark.parametrize("seed", range(5))
def test_groups_by_membership_are_those_of_the_top_lists(seed):
    before, after = counts(seed), counts(seed + 100)
    found = compare_counts(before, after, Reading.MEMBERSHIP, upper=6, lower=15)
    for c in range(len(before)):
        top = [
            [sorted(range(40), key=lambda s, x=x: (-x[c, s], s))[:n] for n in (6, 15)]
            for x in (before, after)
        ]
        lists = [({s for s in few if x[c, s] > 0}, set(many)) for (few, many), x in
                 zip(top, (before, after), strict=True)]  # fmt: skip
        assert set(np.flatnonzero(found.high[c])) == lists[0][0] & lists[1][0]
        assert set(np.flatnonzero(found.high_to_low[c])) == lists[0][0] - lists[1][1]
        assert set(np.flatnonzero(found.low_to_high[c])) == lists[1][0] - lists[0][1]


def test_equal_models_have_no_latent_off_the_diagonal():
    same = counts(0)
    for reading in Reading:
        found = compare_counts(same, same, reading, 6, 15)
        assert found.high.any() and not found.high_to_low.any() and not found.low_to_high.any()
    swapped = [
        compare_counts(*pair, Reading.VALUE, 6, 15) for pair in ((same, counts(9)), (counts(9), same))
    ]
    np.testing.assert_array_equal(swapped[0].high_to_low, swapped[1].low_to_high)
    wide = counts(0, latents=300)
    rows = group_table({"a": wide}, {"a": wide})
    assert rows["a", "membership"]["high"] == np.mean(np.minimum((wide > 0).sum(1), 50))


def test_bounds_and_shapes_are_checked():
    for upper, lower in ((0, 5), (7, 5), (5, 41)):
        with pytest.raises(PatchSAEError, match="upper="):
            compare_counts(counts(0), counts(1), upper=upper, lower=lower)
    with pytest.raises(PatchSAEError, match="use the same classes"):
        compare_counts(counts(0), counts(0, classes=2))


def test_correlation_leaves_silent_latents_out():
    before, after = np.array([0, 1, 2, 3, 0, 0]), np.array([0, 2, 4, 6, 0, 0])
    assert correlation(before, after) == pytest.approx(1)
    before, after = counts(3)[0], counts(4)[0]
    active = (before + after) > 0
    assert correlation(before, after) == pytest.approx(np.corrcoef(before[active], after[active])[0, 1])
    assert np.isnan(correlation(np.zeros(4), np.zeros(4)))


def test_improvement_is_relative_to_what_was_left():
    assert improvement_rate(0.6, 0.8) == pytest.approx(0.5)
    assert improvement_rate(0.8, 0.6) == pytest.approx(-1)
    assert np.isnan(improvement_rate(1, 1))


def test_mcnemar_counts_only_images_on_which_the_models_differ():
    first = np.array([1] * 10 + [0] * 3 + [1] * 50 + [0] * 20)
    second = np.array([0] * 10 + [1] * 3 + [1] * 50 + [0] * 20)
    found = mcnemar(first, second)
    # 2 · P(X ≤ 3), X ~ B(13, 1/2): 2 · (1 + 13 + 78 + 286) / 2^13
    assert found[:2] == (10, 3) and found.p == pytest.approx(2 * 378 / 2**13)
    assert mcnemar(first, first) == (0, 0, 1.0)


def test_the_share_of_a_gain_is_that_of_the_means():
    rng = np.random.default_rng(0)
    before, after = rng.random(4000) < 0.3, rng.random(4000) < 0.7
    mixed = np.where(rng.random(4000) < 0.5, before, after)
    found = share_of_gain(before, after, mixed, draws=300)
    expected = (mixed.mean() - before.mean()) / (after.mean() - before.mean())
    assert found.value == pytest.approx(expected) and found.low < found.value < found.high
    assert 0.4 < found.low and found.high < 0.6
    assert share_of_gain(before, after, after, draws=50) == pytest.approx((1, 1, 1))
    assert np.isnan(share_of_gain(before, before, after, draws=50).value)


def all_at_once(before, after, mixed, seed, draws):
    """Bootstrap as the definition has it, with the weights of all draws in one table."""
    right = np.stack([before, after, mixed]).astype(float)
    rng, n = np.random.default_rng(seed), right.shape[1]
    weights = np.stack([np.bincount(rng.integers(n, size=n), minlength=n) for _ in range(draws)])
    low, high, middle = right @ weights.T / n
    return (middle - low) / (high - low)


def test_shares_and_their_difference_are_those_of_the_same_draws():
    rng = np.random.default_rng(1)
    before, after, first, second = (rng.random(300) < p for p in (0.3, 0.7, 0.6, 0.5))
    shares = [all_at_once(before, after, mixed, 3, 200) for mixed in (first, second)]
    for mixed, drawn in zip((first, second), shares, strict=True):
        expected = np.quantile(drawn, (0.025, 0.975))
        assert share_of_gain(before, after, mixed, 3, 200)[1:] == pytest.approx(expected, rel=1e-12)
    found = difference_of_shares(before, after, first, second, 3, 200)
    assert found[1:] == pytest.approx(np.quantile(shares[0] - shares[1], (0.025, 0.975)), rel=1e-12)
    gain = after.mean() - before.mean()
    assert found.value == pytest.approx((first.mean() - second.mean()) / gain)


def test_a_difference_may_be_clear_where_two_intervals_overlap():
    rng = np.random.default_rng(2)
    before = rng.random(400) < 0.3
    after = before | (rng.random(400) < 0.5)
    second = np.where(rng.random(400) < 0.5, before, after)
    first = second | (rng.random(400) < 0.03)  # right wherever the second is, and on a few more
    one, other = (share_of_gain(before, after, mixed) for mixed in (first, second))
    assert one.low < other.high  # as two intervals they say nothing
    assert difference_of_shares(before, after, first, second).low > 0
    assert difference_of_shares(before, after, second, first).high < 0
    assert difference_of_shares(before, after, first, first) == (0, 0, 0)


def test_a_share_of_many_images_takes_little_memory():
    import tracemalloc

    n = 66_000
    right = np.random.default_rng(0).random((3, n)) < 0.5
    tracemalloc.start()
    share_of_gain(*right, draws=20)
    assert tracemalloc.get_traced_memory()[1] < 20 * 8 * n  # three copies and one draw, not all draws
    tracemalloc.stop()


@pytest.mark.parametrize("labels", [
    np.arange(80) % 5, np.arange(80) % 4, np.arange(261), np.repeat(np.arange(7), 3), np.zeros(5, int),
])  # fmt: skip
def test_the_half_to_select_on_has_half_of_each_class(labels):
    marked = selection_half(labels)
    assert marked.sum() == -(-len(labels) // 2)
    counts = [np.bincount(labels[part], minlength=labels.max() + 1) for part in (marked, ~marked)]
    assert np.abs(counts[0] - counts[1]).max() <= 1


@pytest.fixture(scope="module")
def models():
    plain = make(text={"layers": 4}, vision={"image_size": 112, "patch_size": 28})
    return plain, {m: learned(plain, method=m, depth=3) for m in ("maple", "coop", "vpt")}


@pytest.mark.parametrize("method", ["maple", "coop", "vpt"])
@torch.no_grad()
def test_pure_mixtures_are_the_models_and_mixed_ones_take_each_part_from_one(models, method, tmp_path):
    plain, adapted = models[0], models[1][method]
    images = SceneSet("mixed", "test", range(0, 20, 2), (0, 1), 3, SINGLE)
    prompt = "a photo of a {}."
    texts = zero_shot_weights(plain, images.classnames, prompt), adapted.class_weights(images.classnames)
    sae = SAE(SAEConfig(plain.d_model, 2))
    args = sae, "s", plain, adapted, images, texts, tmp_path
    found = mix_models(*args, batch_size=7, progress=False)
    assert len(PARTS) == 8 and set(found.tokens) == set(found.latents) == set(PARTS)
    batch = images.load(range(len(images)))
    x = [model.residual(model.normalize(batch.images)) for model in (plain, adapted)]
    for part, ranks in ((None, found.tokens), (sae, found.latents)):
        shown = [stream[:, :17] if part is None else part(stream[:, :17]) for stream in x]
        for parts in PARTS:
            tokens = torch.cat([shown[parts.stream], x[parts.prompt_tokens][:, 17:]], 1)
            embeddings = (plain, adapted)[parts.prompt_tokens].finish(tokens)
            right = zero_shot_logits(plain, embeddings, texts[parts.words]).argmax(-1) == batch.labels
            np.testing.assert_array_equal(ranks[parts] == 0, right, err_msg=str(parts))
    if method == "coop":  # nothing about the images is learned
        for words in (0, 1):
            same = [found.tokens[Parts(s, h, words)] for s in (0, 1) for h in (0, 1)]
            assert all((ranks == same[0]).all() for ranks in same)
    again = mix_models(*args, progress=False)
    assert all((again.latents[parts] == found.latents[parts]).all() for parts in PARTS)
    assert len(list(tmp_path.glob("mixed-mixed-*/manifest.json"))) == 1


def test_a_killed_run_of_mixtures_goes_on_at_the_first_chunk_that_is_missing(models, tmp_path, monkeypatch):
    monkeypatch.setattr(masking, "CHUNK_IMAGES", 8)
    plain, adapted = models[0], models[1]["maple"]
    images = SceneSet("mixed", "test", range(0, 20, 2), (0, 1), 3, SINGLE)
    texts = [zero_shot_weights(model.plain if model is adapted else model, images.classnames, "a {}.")
             for model in (plain, adapted)]  # fmt: skip
    args = SAE(SAEConfig(plain.d_model, 2)), "s", plain, adapted, images, texts
    whole = mix_models(*args, tmp_path / "whole", batch_size=4, progress=False)
    load, loaded = SceneSet.load, []

    def some(self, indices):
        if len(loaded) == 5:  # in the middle of the third chunk
            raise KeyboardInterrupt
        loaded.append(list(indices))
        return load(self, indices)

    with monkeypatch.context() as patch:
        patch.setattr(SceneSet, "load", some)
        with pytest.raises(KeyboardInterrupt):
            mix_models(*args, tmp_path / "killed", batch_size=4, progress=False)
    (folder,) = (tmp_path / "killed").iterdir()
    chunks = sorted(path.name for path in folder.glob("chunk-*"))
    assert chunks == ["chunk-00000000.safetensors", "chunk-00000008.safetensors"]
    content = (folder / chunks[1]).read_bytes()
    (folder / chunks[1]).write_bytes(content[:50])
    with pytest.raises(PatchSAEError, match="chunk-00000008.safetensors' holds no part of these mixtures"):
        mix_models(*args, tmp_path / "killed", batch_size=4, progress=False)
    (folder / chunks[1]).write_bytes(content)
    loaded.clear()
    with monkeypatch.context() as patch:
        patch.setattr(SceneSet, "load", lambda self, i: loaded.append(list(i)) or load(self, i))
        again = mix_models(*args, tmp_path / "killed", batch_size=4, progress=False)
    assert not loaded  # the refused call had made the rest
    for ours, theirs in zip(again, whole, strict=True):
        assert all((ours[parts] == theirs[parts]).all() for parts in PARTS)
    assert {path.name for path in folder.iterdir()} == {
        ".checked.json",
        ".lock",
        "manifest.json",
        "ranks.safetensors",
    }


def test_models_cut_at_different_blocks_are_refused(models):
    plain, adapted = models[0], models[1]["maple"]
    with pytest.raises(PatchSAEError, match="cut after block 2, the adapted model after 3"):
        mix_models(None, "", plain, adapted.at_block(3), None, (None, None), "")


def test_prompt_tokens_are_counted_only_if_asked_for(models, tmp_path):
    from patchsae.latents.atlas import AtlasConfig, make_atlas

    adapted = models[1]["maple"]
    images = SceneSet("prompted", "train", range(0, 20, 2), (0, 1), 2, SINGLE)
    sae = SAE(SAEConfig(adapted.d_model, 2))
    args = images, AtlasConfig(k=1, include_prompt_tokens=True), tmp_path, "s"
    atlas = make_atlas(sae, adapted, *args, progress=False)
    with torch.no_grad():
        f = (
            sae.encode(adapted.residual(adapted.normalize(images.load(range(20)).images))) > 0.2
        )  # [N, T, S]
    labels = torch.from_numpy(images.labels)
    for flag, tokens in ((False, 17), (True, 19)):
        expected = torch.stack([f[labels == c][:, :tokens].sum((0, 1)) for c in range(10)])
        np.testing.assert_array_equal(class_counts(atlas, flag), expected)
    plain = make_atlas(sae, models[0], images, AtlasConfig(k=1), tmp_path, "s", progress=False)
    with pytest.raises(PatchSAEError, match="no prompt tokens"):
        class_counts(plain, True)
