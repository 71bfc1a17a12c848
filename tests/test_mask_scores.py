"""Scores against masks, pixel by pixel and by scikit-learn; choosing latents and its controls, by loops."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import average_precision_score
from tiny import tiny_backbone

from patchbook.scenes.embedded import SINGLE, SceneSet, domain_sets
from patchsae.images.files import FolderImages
from patchsae.latents.best_latents import Row, alternate, choose, compare, random_sae, score_of
from patchsae.latents.maps import Fired, fired, patch_cover
from patchsae.latents.scores import METRICS, Metric, Scores, Truth, _score, score_latents, token_length
from patchsae.latents.spatial import morans_i
from patchsae.runs.errors import PatchSAEError
from patchsae.sae.model import SAE, SAEConfig

TAU = 0.05


@pytest.fixture(scope="module")
def backbone():
    return tiny_backbone()


@pytest.fixture(scope="module")
def sae():
    sae = SAE(SAEConfig(d_in=32, expansion=2), seed=1)
    with torch.no_grad():
        sae.b_enc -= 0.8
        sae.b_enc[5] = -1e3
    return sae


@pytest.fixture(scope="module")
def sets():
    return domain_sets("test", classes=4, per_class=3)


@pytest.fixture(scope="module")
def scored(backbone, sae, sets) -> Scores:
    return score_latents({"sae": sae}, backbone, sets, TAU, batch_size=5, progress=False).scores["sae"]


@torch.no_grad()
def pixel_scores(patch_map, mask, grid):
    """Every score of one map, from its definition."""
    size = mask.shape[0]
    big = F.interpolate(patch_map.view(1, 1, *grid), (size, size))[0, 0].numpy()

    def iou(threshold):
        on = big > threshold
        return (on & mask).sum() / (on | mask).sum()

    best = max(iou(t) for t in [0.0, *patch_map.tolist()])
    strongest = int(patch_map.argmax())
    side = size // grid[0]
    y, x = strongest // grid[1] * side + side // 2, strongest % grid[1] * side + side // 2
    positive = patch_cover(torch.from_numpy(mask)[None], grid)[0].numpy() >= 0.5
    return iou(TAU), best, float(mask[y, x]), average_precision_score(positive, patch_map.numpy())


@torch.no_grad()
def test_every_score_equals_its_definition(backbone, sae, sets, scored):
    expected, kept, n = {}, [], 0
    for group, images in enumerate(sets.values()):
        scenes = images.scenes(range(len(images)))
        maps = sae.encode(backbone.residual(backbone.normalize(scenes.images))[:, 1:])  # [N, P, S]
        for i, mask in enumerate((scenes.masks == 1).numpy()):
            if not (patch_cover(torch.from_numpy(mask)[None], backbone.grid) >= 0.5).any():
                continue
            kept.append((group, i, i % 4, (scenes.concepts[i] >= 0).sum()))
            for s in np.flatnonzero(maps[i].amax(0) > 0):
                values = pixel_scores(maps[i, :, s], mask, backbone.grid)
                expected[n, s] = (*values, maps[i, :, s].mean().item())
            n += 1
    assert list(zip(scored.image, scored.latent, strict=True)) == sorted(expected)
    table = np.array([expected[key] for key in sorted(expected)])
    np.testing.assert_allclose(scored.value.T, table[:, :4], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(scored.activation, table[:, 4], rtol=1e-4, atol=1e-7)
    assert len(table) > 500 and 0.02 < table[:, 2].mean() < 0.98
    about = scored.group, scored.index, scored.labels, scored.objects
    assert list(zip(*about, strict=True)) == kept
    assert scored.left_out == 48 - len(kept) > 0


def test_ties_go_to_the_lowest_patch_and_enter_together():
    covered = np.array([[0, 16, 0, 0]], np.float32)  # the object is patch 1 of 2×2
    truth = Truth(covered, covered > 0, covered > 0, np.full(4, 16, np.float32))
    found = Fired(np.array([0, 0]), np.array([0, 1]), np.array([0, 2, 4]), np.array([1, 3, 0, 1]),
                  np.array([1, 1, 1, 1], np.float32))  # fmt: skip
    value, activation, _ = _score(found, truth, 0.5, (2, 2))
    np.testing.assert_allclose(value[2], [1, 0])
    np.testing.assert_allclose(value[3], [0.5, 0.5])
    np.testing.assert_allclose(value[:2], 0.5)
    np.testing.assert_allclose(activation, 0.5)


def test_several_saes_and_blocks_share_a_pass(backbone, sae, sets, scored):
    one = {"openmoji": sets["openmoji"]}
    encoders = {"cls": lambda images, tokens: tokens[:, 0]}
    both = score_latents(
        {"a": sae, "b": sae}, backbone, one, TAU, {"b": 2}, encoders, batch_size=7, progress=False
    )
    alone = score_latents({"b": sae}, backbone.at_block(2), one, TAU, progress=False)
    here = scored.group[scored.image] == 0
    np.testing.assert_allclose(both.scores["a"].value, scored.value[:, here], rtol=1e-5)
    np.testing.assert_allclose(both.scores["b"].value, alone.scores["b"].value, rtol=1e-5)
    with torch.no_grad():
        pixels = backbone.normalize(sets["openmoji"].load(both.scores["a"].index).images)
        direct = backbone.residual(pixels)[:, 0]
    np.testing.assert_allclose(both.embeddings["cls"], direct, rtol=1e-4, atol=1e-5)
    assert alone.embeddings == {}


@torch.no_grad()
def test_the_length_of_tokens_is_one_map(backbone, sets):
    centre = torch.full((32,), 0.1)
    one = {"twemoji": sets["twemoji"]}
    found = score_latents({"length": token_length(centre)}, backbone, one, TAU, progress=False).scores
    found = found["length"]
    assert found.latents == 1 and (found.latent == 0).all() and len(found.image) == len(found.labels)
    scenes = sets["twemoji"].scenes(found.index)
    x = backbone.residual(backbone.normalize(scenes.images))[:, 1:]
    maps = (x - centre).norm(dim=-1)
    masks = (scenes.masks == 1).numpy()
    expected = [pixel_scores(m, mask, backbone.grid) for m, mask in zip(maps, masks, strict=True)]
    np.testing.assert_allclose(found.value.T, expected, rtol=1e-4)


def test_halves_are_alike():
    keys = np.random.default_rng(0).integers(0, 3, (2, 100))
    first = alternate(*keys)
    for a in range(3):
        for b in range(3):
            here = first[(keys[0] == a) & (keys[1] == b)]
            assert (here == (np.arange(len(here)) % 2 == 0)).all()


@pytest.fixture(scope="module")
def table() -> Scores:
    rng = np.random.default_rng(3)
    dense = rng.random((30, 8)).astype(np.float32) * (rng.random((30, 8)) < 0.4)
    dense[:, 6] = 0
    image, latent = np.nonzero(dense)
    value = np.stack([dense[image, latent]] * 4)
    extra = np.zeros(len(image), np.float32)
    chance = rng.random((4, 30)).astype(np.float32)
    labels, group, index = np.arange(30) % 5, np.zeros(30, int), np.arange(30)
    return Scores(image, latent, value, extra, extra, chance, labels, group, index, group + 1, 8, 0)


@pytest.mark.parametrize("metric", METRICS)
def test_the_choice_and_its_controls_follow_their_definitions(table, metric):
    dense = np.zeros((30, 8))
    dense[table.image, table.latent] = table.value[METRICS.index(metric)]
    on = alternate(table.labels)
    chosen = choose(table, metric, on)
    for c in range(5):
        assert chosen[c] == dense[on & (table.labels == c)].mean(0).argmax()
    np.testing.assert_allclose(
        score_of(table, metric, chosen[table.labels]), dense[np.arange(30), chosen[table.labels]]
    )
    assert not score_of(table, metric, np.full(30, -1)).any()
    assert not score_of(table, metric, np.full(30, 6)).any()
    untrained = table._replace(value=table.value[:, ::-1])
    found = compare(table, untrained, table, metric, on, ~on)
    one = dense[on].mean(0).argmax()
    for place, i in enumerate(np.flatnonzero(~on)):
        c = table.labels[i]
        active = (dense[on & (table.labels == c)] > 0).any(0)
        assert found[Row.BEST][place] == pytest.approx(dense[i, chosen[c]])
        assert found[Row.ONE][place] == pytest.approx(dense[i, one])
        others = np.mean([dense[i, chosen[o]] for o in range(5) if o != c])
        assert found[Row.OTHER][place] == pytest.approx(others)
        assert found[Row.RANDOM][place] == pytest.approx(dense[i, active].mean())
        assert found[Row.LENGTH][place] == pytest.approx(dense[i, 0])
        assert found[Row.CHANCE][place] == pytest.approx(table.chance[METRICS.index(metric), i])
    other = choose(untrained, metric, on)
    assert found[Row.UNTRAINED_OTHER].shape == found[Row.OTHER].shape
    np.testing.assert_allclose(found[Row.UNTRAINED], score_of(untrained, metric, other[table.labels])[~on])


def test_a_class_without_a_score_has_no_latent(table):
    silent = table.labels[table.image] == 2
    value = table.value.copy()
    value[:, silent] = 0
    on = alternate(table.labels)
    chosen = choose(table._replace(value=value), Metric.POINTING, on)
    assert chosen[2] == -1 and (np.delete(chosen, 2) >= 0).all()


@torch.no_grad()
def test_a_random_sae_is_as_sparse_and_as_strong(sae):
    x = torch.randn(400, 32, generator=torch.Generator().manual_seed(0)) + 1
    control = random_sae(sae, x, seed=5)
    f, g = sae.encode(x), control.encode(x)
    assert (g > 0).sum() == pytest.approx(int((f > 0).sum()), rel=1e-3)
    assert g[g > 0].mean() == pytest.approx(f[f > 0].mean().item(), rel=1e-3)
    assert not torch.equal(sae.W_enc, control.W_enc)
    topk = SAE(SAEConfig(d_in=32, expansion=2, activation="topk", k=4))
    assert ((random_sae(topk, x).encode(x) > 0).sum(1) == 4).all()
    sae = SAE(SAEConfig(d_in=32, expansion=2))
    sae.b_enc -= 1e3
    with pytest.raises(PatchSAEError, match="silent on these tokens"):
        random_sae(sae, x)


def test_domains_are_the_same_classes_in_other_styles(sets):
    assert list(sets) == ["openmoji", "twemoji", "sketch", "silhouette"]
    assert len({images.classnames for images in sets.values()}) == 1
    for style, images in enumerate(sets.values()):
        scenes = images.scenes(range(len(images)))
        assert (scenes.styles[:, 0] == style).all()
        assert (scenes.concepts[:, 0] == images.concept_of_label[images.labels]).all()
    assert not torch.equal(sets["openmoji"].load([0]).images, sets["twemoji"].load([0]).images)


def test_bad_requests_are_named(backbone, sae, sets, scored, tmp_path):
    from PIL import Image

    (tmp_path / "cat").mkdir()
    Image.new("RGB", (120, 120)).save(tmp_path / "cat" / "0.png")
    with pytest.raises(PatchSAEError, match="'photos' has no object masks"):
        score_latents({"sae": sae}, backbone, {"photos": FolderImages(tmp_path, 112)})
    with pytest.raises(PatchSAEError, match="tau=-1"):
        score_latents({"sae": sae}, backbone, sets, tau=-1)
    hidden = SceneSet("tiny", "test", [0], [0], 2, SINGLE)
    hidden.scenes = lambda rows: SceneSet.scenes(hidden, rows)._replace(
        masks=torch.zeros(len(rows), 112, 112, dtype=torch.uint8)
    )
    with pytest.raises(PatchSAEError, match="no image shows its object"):
        score_latents({"sae": sae}, backbone, {"hidden": hidden}, progress=False)
    everything = np.ones(len(scored.labels), bool)
    with pytest.raises(PatchSAEError, match="chosen on some images and reported on others"):
        compare(scored, scored, scored, Metric.IOU, everything, everything)
    with pytest.raises(PatchSAEError, match="classes=1000 must lie in 1.."):
        domain_sets("test", 1000, 1)


@torch.no_grad()
def test_each_row_has_the_coherence_of_its_map(backbone, sae, sets, scored):
    x = backbone.residual(backbone.normalize(sets["openmoji"].load([0]).images))[:, 1:]
    direct = morans_i(fired(sae, x), backbone.grid)
    assert np.isfinite(direct).any()
    np.testing.assert_allclose(scored.moran[scored.image == 0], direct, rtol=1e-3, atol=1e-5)
