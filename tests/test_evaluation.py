"""What is left of reconstruction, predictions and losses, against direct computations on a small model."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import binomtest, spearmanr

from patchsae.masking import through as evaluation
from patchsae.masking.through import (
    contrastive_loss,
    label_rank,
    per_class_accuracy,
    reconstruction,
    recovered,
    through_sae,
    zero_shot,
    zeroed,
)
from patchsae.runs.errors import PatchSAEError
from patchsae.runs.intervals import bootstrap, bootstrap_ratio, rank_correlation, wilson
from patchsae.sae.model import SAE, SAEConfig


@pytest.fixture(scope="module")
def sae() -> SAE:
    return SAE(SAEConfig(d_in=32, expansion=2), seed=1)


@pytest.mark.parametrize("options", [{}, {"input_norm": "layer_norm", "activation": "topk", "k": 8}])
def test_reconstruction_equals_a_direct_computation(backbone, images, options):
    sae = SAE(SAEConfig(d_in=32, expansion=2, **options), seed=1)
    found = reconstruction(sae, backbone, images.subset(range(20)), batch_size=7)
    with torch.no_grad():
        x = backbone.residual(backbone.normalize(images.load(range(20)).images)).flatten(0, 1)
        f, x_hat = sae.encode(x), sae(x)
    assert found.tokens == len(x)
    assert found.l0 == pytest.approx((f > 0).sum(1).float().mean().item())
    assert found.l1_norm == pytest.approx(f.sum(1).mean().item(), rel=1e-5)
    fvu = (x - x_hat).square().sum() / (x - x.mean(0)).square().sum()
    assert found.fvu == pytest.approx(fvu.item(), rel=1e-4)
    assert found.dead_share == pytest.approx((~(f > 0).any(0)).float().mean().item(), abs=1e-6)
    mse = ((x - x_hat).square().mean(1) / x.norm(dim=1)).mean()
    assert found.mse == pytest.approx(mse.item(), rel=1e-5)


def test_edits_reach_prediction_and_cross_entropy(backbone, images, sae):
    text = F.normalize(torch.randn(10, 16, generator=torch.Generator().manual_seed(0)), dim=1)
    some = images.subset(range(30))
    edits = (None, through_sae(sae, backbone), zeroed(backbone), zeroed(backbone, "patches"))
    found = zero_shot(backbone, some, text, edits, 8, progress=None)
    with torch.no_grad():
        tokens = backbone.residual(backbone.normalize(some.load(range(30)).images))
        for row, changed in enumerate((tokens, sae(tokens), torch.zeros_like(tokens))):
            logits = backbone.logit_scale * F.normalize(backbone.finish(changed), dim=1) @ text.T
            assert (found.predictions[row] == logits.argmax(1).numpy()).all()
            own = F.cross_entropy(logits, torch.from_numpy(some.labels), reduction="none")
            np.testing.assert_allclose(found.cross_entropy[row], own, rtol=1e-3, atol=1e-4)
    assert len(set(found.predictions[2])) == 1  # nothing of the image is left
    assert len(set(found.predictions[3])) > 1  # the CLS token is


def test_recovered():
    assert recovered(0.68, 0.65, 0.001) == pytest.approx(0.649 / 0.679)
    assert recovered(1.2, 1.2, 6.9) == 1 and recovered(1.2, 6.9, 6.9) == 0
    assert recovered(2.0, 1.9, 5.0) == pytest.approx(3.1 / 3)  # better than the original: not clipped
    assert np.isnan(recovered(0.5, 0.4, 0.5))


def direct_losses(backbone, sae, images, rows):
    """Follow facts.md §4.4, written out for one batch."""
    batch = images.load(rows)
    names = [images.classnames[label] for label in batch.labels]
    words = backbone.encode_text([f"A photo of a {name}." for name in names])
    tokens = backbone.residual(backbone.normalize(batch.images))
    rebuilt, none = tokens.clone(), tokens.clone()
    rebuilt[:, 0], none[:, 0] = sae(tokens[:, 0]), 0
    for changed in (tokens, rebuilt, none):
        cosine = F.normalize(backbone.finish(changed), dim=1) @ words.T
        logits = cosine * backbone.model.logit_scale.exp()
        image_to_text = -logits.log_softmax(1).diagonal().mean()
        text_to_image = -logits.log_softmax(0).diagonal().mean()
        yield ((image_to_text + text_to_image) / 2).item()


@torch.no_grad()
def test_contrastive_loss_equals_a_direct_computation(backbone, images, sae, monkeypatch):
    looked_at, real = [], evaluation.edited_embeddings

    def spy(backbone, used, *rest):
        looked_at.append(used.indices)
        return real(backbone, used, *rest)

    monkeypatch.setattr(evaluation, "edited_embeddings", spy)
    options = {"draws": 3, "batch_size": 7, "progress": None}
    found = contrastive_loss(sae, backbone, images, 12, seed=3, **options)
    rngs = [np.random.default_rng([3, n]) for n in range(3)]
    drawn = [rng.permutation(len(images))[:12] for rng in rngs]
    distinct = evaluation._one_per_name(images, 12, rngs)
    assert all(sorted(images.labels[rows]) == list(range(10)) for rows in distinct)
    (used,) = looked_at  # one pass, over the drawn images alone
    assert (used == np.unique(np.concatenate([*drawn, *distinct]))).all()
    for contrast, batches, n in ((found.drawn, drawn, 12), (found.distinct, distinct, 10)):
        direct = np.array([list(direct_losses(backbone, sae, images, rows)) for rows in batches])
        for spread, column in zip(contrast[:3], direct.T, strict=True):
            assert spread.mean == pytest.approx(column.mean(), rel=1e-5)
            assert spread.sd == pytest.approx(column.std(ddof=1), rel=1e-3)
        score = (direct[:, 1] - direct[:, 0]) / (direct[:, 2] - direct[:, 0])
        assert contrast.score.mean == pytest.approx(score.mean(), rel=1e-3) and contrast.images == n
    assert contrastive_loss(sae, backbone, images, 12, seed=3, **options) == found
    assert contrastive_loss(sae, backbone, images, 12, seed=4, **options) != found
    assert contrastive_loss(sae, backbone, images, 4, **options).distinct.images == 4


@torch.no_grad()
def test_classes_that_share_a_name_are_one(backbone, images, sae):
    """As two pairs of ImageNet's do (facts.md §3)."""
    twice = images.subset(range(40))
    twice.classnames = (*images.classnames[:9], images.classnames[0])
    assert contrastive_loss(sae, backbone, twice, 20, draws=2, progress=None).distinct.images == 9


def test_bad_requests_are_named(backbone, images, sae):
    with pytest.raises(
        PatchSAEError, match="batch_images=1024 cannot be drawn from the 40 images of 'tiny'"
    ):
        contrastive_loss(sae, backbone, images)
    with pytest.raises(PatchSAEError, match="text='a photo' has no place"):
        contrastive_loss(sae, backbone, images, 8, text="a photo")
    with pytest.raises(PatchSAEError, match="draws=1"):
        contrastive_loss(sae, backbone, images, 8, draws=1)
    with pytest.raises(PatchSAEError, match="images of one class"):
        contrastive_loss(sae, backbone, images.classes([2]), 4)


def test_the_rank_of_a_label_counts_the_classes_before_it():
    logits = torch.tensor([[1.0, 3.0, 3.0, 2.0], [5.0, 5.0, 5.0, 5.0]])
    found = [label_rank(logits, torch.full((2,), label)).tolist() for label in range(4)]
    assert found == [[3, 0], [0, 1], [1, 2], [2, 3]]  # of equal ones the first class comes first
    nested = label_rank(logits.expand(3, 2, 4), torch.tensor([[0, 3]]).expand(3, 2))
    assert nested.tolist() == [[3, 3]] * 3
    some = torch.randint(0, 3, (50, 4), generator=torch.Generator().manual_seed(0)).float()
    labels = torch.arange(50) % 4
    assert (label_rank(some, labels) == 0).equal(some.argmax(-1) == labels)


def test_wilson_intervals_are_scipys():
    right, of = np.array([0, 3, 11, 40]), np.array([5, 11, 11, 60])
    found = wilson(right, of)
    for i in range(4):
        expected = binomtest(right[i], of[i]).proportion_ci(method="wilson")
        assert (found.low[i], found.high[i]) == pytest.approx((expected.low, expected.high), abs=1e-12)
    np.testing.assert_allclose(found.value, right / of)
    assert found.low[2] < 0.8 and found.high[2] == 1  # all right is not certain
    assert np.isnan(wilson(np.array([0]), np.array([0]))).all()


def test_accuracy_per_class_is_recall():
    rank, labels = np.array([0, 0, 2, 1, 0, 7]), np.array([0, 0, 0, 2, 2, 2])
    first, fifth = (per_class_accuracy(rank, labels, 4, top) for top in (1, 5))
    np.testing.assert_allclose(first.value, [2 / 3, np.nan, 1 / 3, np.nan])
    np.testing.assert_allclose(fifth.value, [1, np.nan, 2 / 3, np.nan])
    np.testing.assert_allclose(
        first[1:], np.array(wilson(np.array([2, 0, 1, 0]), np.array([3, 0, 3, 0])))[1:]
    )


def test_the_interval_of_a_ratio_of_sums_resamples_both():
    rng = np.random.default_rng(0)
    b = rng.random(400) + 0.5
    assert bootstrap_ratio(3 * b, b, draws=50) == pytest.approx((3, 3, 3))
    a = b * rng.normal(2, 0.5, 400)
    found = bootstrap_ratio(a, b)
    spread = (a - found.value * b).std() / b.mean() / 20  # by the delta method
    assert found.value == pytest.approx(a.sum() / b.sum())
    assert found.high - found.low == pytest.approx(2 * 1.96 * spread, rel=0.15)
    assert np.isnan(bootstrap_ratio(a, np.zeros(400), draws=5)).all()


def test_rank_correlation_is_spearmans_with_an_interval_over_pairs():
    rng = np.random.default_rng(0)
    a = rng.integers(0, 20, 300).astype(float)  # with ties
    b = np.exp(a / 5) + 20 * rng.standard_normal(300)
    found = rank_correlation(a, b, draws=300)
    assert found.value == pytest.approx(spearmanr(a, b).statistic)
    resamples = [spearmanr(a[i], b[i]).statistic for i in rng.integers(300, size=(300, 300))]
    low, high = np.quantile(resamples, (0.025, 0.975))
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.03) and -1 <= found.low
    same = rank_correlation(a, a**3, draws=50)
    assert same == pytest.approx((1, 1, 1)) and np.isnan(rank_correlation(a, np.ones(300), draws=5).value)


def test_bootstrap_covers_the_mean():
    values = (np.random.default_rng(0).random(500) < 0.3).astype(float)
    interval = bootstrap(values)
    assert interval.low < values.mean() == interval.value < interval.high
    assert interval.high - interval.low == pytest.approx(2 * 1.96 * np.sqrt(0.21 / 500), rel=0.2)


def test_what_is_not_finite_has_no_rank_and_no_measure(backbone, images, sae):
    logits = torch.tensor([[1.0, torch.nan, 3.0]])
    for label in range(3):
        with pytest.raises(PatchSAEError, match="what is ranked has NaN or infinite values; use"):
            label_rank(logits, torch.tensor([label]))
    some, broken = images.subset(range(8)), SAE(SAEConfig(d_in=32, expansion=2), seed=1)
    broken.b_dec.data[0] = torch.nan
    with pytest.raises(PatchSAEError, match="what the SAE rebuilds has NaN"):
        reconstruction(broken, backbone, some)
    text = F.normalize(torch.randn(10, 16, generator=torch.Generator().manual_seed(0)), dim=1)
    for edit, words in ((through_sae(broken, backbone), text), (None, torch.full_like(text, torch.inf))):
        with pytest.raises(PatchSAEError, match="what tiny answers has NaN or infinite values; use dtype"):
            zero_shot(backbone, some, words, [edit], progress=None)
    with pytest.raises(PatchSAEError, match="'tiny' has no images"):
        reconstruction(sae, backbone, images.subset([]))


@pytest.mark.parametrize("size", [0, -1, 2.5, True, None])
def test_a_batch_of_no_images_measures_nothing(backbone, images, sae, size):
    for measure in (
        lambda: reconstruction(sae, backbone, images, batch_size=size),
        lambda: zero_shot(backbone, images, torch.ones(10, 16), [None], size),
    ):
        with pytest.raises(PatchSAEError, match=f"batch_size={size} must be a whole number, 1 or more"):
            measure()
